"""`python -m spec_decode.report RUN...`: what drafters learned and what they bring, as one self-contained HTML page.

From the logs: acceptance per level and the loss of the first over the updates. From the saved drafters, on a few
prompts: acceptance per level, where the time goes, and draft trees with their accepted paths. Several runs for one
target are compared.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.report")  # before the imports below, which take seconds

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.report import LoggedRun, Section, report_command
from kd_common.text import Row, encode_each
from spec_decode.data.corpus import prompt_rows
from spec_decode.data.prompts import packaged_prompts, read_prompts
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.inputs import check_length
from spec_decode.decoding.measure import Measurement, measure
from spec_decode.decoding.session import Session, build_decoder, find_drafter, parse_tree
from spec_decode.viz.figures import Passes, plot_acceptance, plot_time, plot_training, plot_trees


class Run(LoggedRun):
    """A finished run of a drafter."""

    command = "spec_decode.fit"
    validated = ("val/tau",)

    def summary(self) -> dict[str, str]:
        """Line of the first table."""
        drafter = self.model["drafter"]
        updates, taus = self.metrics["val/tau"]
        return {
            "run": self.name,
            "drafter": drafter["class_path"].rpartition(".")[2],
            "settings": ", ".join(f"{key} {value}" for key, value in drafter["init_args"].items()),
            "updates": f"{updates[-1] + 1:.0f}",
            "tau, validation": f"{taus[-1]:.2f}",
        }


def decode(
    runs: Sequence[Run], prompts: Sequence[str | Row], *, tree: str | None, max_new_tokens: int
) -> tuple[dict[str, Measurement], dict[str, Passes], Any]:
    """Decode prompts plainly and with every run's drafter; return measurements, first passes and the tokenizer.

    Args:
        runs: Runs for one target.
        prompts: Conversations, or texts of users.
        tree: See `sections`.
        max_new_tokens: Tokens per prompt.
    """
    session = Session.open(str(runs[0].folder / "drafter_best"), None, dtype="auto", device="cpu", tree="chain")
    decoders = {"plain decoding": SpeculativeDecoder(session.target)}
    for run in runs:
        drafter = find_drafter(str(run.folder / "drafter_best"), session.target, session.tokenizer)
        assert drafter is not None
        shape = parse_tree(tree) if tree else (3, *[2] * ((drafter.capabilities.max_depth or 1) - 1))
        decoders[run.name] = build_decoder(session.target, drafter, shape)
    encoded = encode_each(prompt_rows(prompts), session.encoder.prompt)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_tokens": session.stops}
    measured = measure(decoders, encoded, **settings)
    pictures = {}
    for run in runs:
        pictures[run.name] = Passes(4)
        decoders[run.name].generate(encoded[:1], **settings, on_pass=pictures[run.name])
    return measured, pictures, session.tokenizer


def sections(
    runs: Sequence[Run],
    *,
    prompts: Path | None = None,
    count: int = 4,
    tree: str | None = None,
    max_new_tokens: int = 96,
) -> list[Section]:
    """Compare drafters for one target.

    Args:
        runs: Their runs.
        prompts: JSONL file of prompts; the last packaged ones, on which `fit` does not train by default, if None.
        count: Prompts that are decoded; 0 leaves decoding out.
        tree: Tree to draft, as in `spec_decode.generate`; by default 3 candidates in the first level and 2 in every
            other one.
        max_new_tokens: Tokens per prompt.

    Raises:
        UserError: If the runs have different targets.
    """
    check_length(max_new_tokens)
    if count < 0:
        raise UserError(f"count must be >= 0, got {count}")
    if len(targets := {run.model["target"]["name"] for run in runs}) > 1:
        raise UserError(f"these runs are for different targets ({', '.join(sorted(targets))}); report on them apart")
    about = f"Target: {targets.pop()}. tau: tokens per target pass, accepted + 1."
    progress = plot_training({run.name: run.metrics for run in runs})
    found = [
        Section("Runs", about, table=[run.summary() for run in runs]),
        Section("Training", "Dark: the first level; light: the last.", progress),
    ]
    if not count:
        return found
    texts: Sequence[str | Row] = packaged_prompts()[::-1] if prompts is None else read_prompts(prompts)
    return found + decoding_sections(runs, texts[:count], tree=tree, max_new_tokens=max_new_tokens)


def decoding_sections(
    runs: Sequence[Run], prompts: Sequence[str | Row], *, tree: str | None, max_new_tokens: int
) -> list[Section]:
    """Show how the drafters decode prompts."""
    measured, pictures, tokenizer = decode(runs, prompts, tree=tree, max_new_tokens=max_new_tokens)
    plain = measured["plain decoding"]
    speeds = [
        {
            "decoder": name,
            "tokens/s": f"{found.tokens_per_second:.1f}",
            "over plain decoding": f"{gain:.2f}x" if (gain := found.speedup_over(plain)) else "",
            "tau": f"{found.tau:.2f}",
        }
        for name, found in measured.items()
    ]
    about = f"{len(prompts)} prompts, greedy, up to {max_new_tokens} tokens each, tree {tree or '3,2,...'}."
    passes = "The first passes of the first prompt: what was drafted, and in green what the target accepted."
    return [
        Section("Acceptance while decoding", about, plot_acceptance(measured)),
        Section("Where the time goes", about, plot_time(measured), speeds),
        *(
            Section(f"Draft trees of {name}", passes, plot_trees(found.kept, tokenizer))
            for name, found in pictures.items()
            if found.kept
        ),
    ]


def main(args: list[str] | None = None) -> Path:
    """Write the report that a command line asks for."""
    return report_command(Run, sections, package="spec_decode", description=__doc__, args=args)


if __name__ == "__main__":
    run_command(main)
