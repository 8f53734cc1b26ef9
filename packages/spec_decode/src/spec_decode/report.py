"""``python -m spec_decode.report RUN...``: what drafters learned and what they bring, as one self-contained HTML page.

From the logs: acceptance per level and the loss of the first over the updates. From the saved drafters, on a few
prompts: acceptance per level, where the time goes, and draft trees with their accepted paths. Several runs for one
target are compared.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.report")  # before the imports below, which take seconds

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_folder
from kd_common.run.report import Section, check_validated, read_config, read_metrics, run_names, write_report
from kd_common.terminal import printable
from kd_common.text import Row, encode_each
from spec_decode.data.corpus import prompt_rows
from spec_decode.data.prompts import packaged_prompts, read_prompts
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.inputs import check_length
from spec_decode.decoding.measure import Measurement, measure
from spec_decode.decoding.session import Session, build_decoder, find_drafter, parse_tree
from spec_decode.viz.figures import Passes, plot_acceptance, plot_time, plot_training, plot_trees


def decode(
    runs: Mapping[str, Path], prompts: Sequence[str | Row], *, tree: str | None, max_new_tokens: int
) -> tuple[dict[str, Measurement], dict[str, Passes], Any]:
    """What was measured while decoding prompts plainly and with every run's drafter, first passes, and the tokenizer.

    Args:
        runs: Folders by name, all for one target.
        prompts: Conversations, or texts of users.
        tree: See `spec_decode.decoding.session.parse_tree`; None for 3 candidates in the first level and 2 in every
            other one.
        max_new_tokens: Tokens per prompt.
    """
    first, *_ = runs.values()
    session = Session.open(str(first / "drafter_best"), None, dtype="auto", device="cpu", tree="chain")
    decoders = {"plain decoding": SpeculativeDecoder(session.target)}
    for name, run in runs.items():
        drafter = find_drafter(str(run / "drafter_best"), session.target, session.tokenizer)
        assert drafter is not None
        shape = parse_tree(tree) if tree else (3, *[2] * ((drafter.capabilities.max_depth or 1) - 1))
        decoders[name] = build_decoder(session.target, drafter, shape)
    encoded = encode_each(prompt_rows(prompts), session.encoder.prompt)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_tokens": session.stops}
    measured = measure(decoders, encoded, **settings)
    pictures = {}
    for name in runs:
        pictures[name] = Passes(4)
        decoders[name].generate(encoded[:1], **settings, on_pass=pictures[name])
    return measured, pictures, session.tokenizer


def report(
    runs: Sequence[Path],
    output: Path,
    *,
    prompts: Path | None = None,
    count: int = 4,
    tree: str | None = None,
    max_new_tokens: int = 96,
) -> Path:
    """Write the report of some runs; returns the page.

    Args:
        runs: Folders that `fit` printed.
        output: Folder of the page.
        prompts: JSONL file of prompts; the last packaged ones, on which `fit` does not train by default, if None.
        count: Prompts that are decoded; 0 leaves decoding out.
        tree: See `decode`.
        max_new_tokens: Tokens per prompt.

    Raises:
        UserError: If a folder holds no finished run.
        UserError: If the runs have different targets, or one is of another command.
    """
    check_length(max_new_tokens)
    if count < 0:
        raise UserError(f"count must be >= 0, got {count}")
    names = {name: run for run, name in run_names(runs).items()}
    models = {name: read_config(run)["model"]["init_args"] for name, run in names.items()}
    metrics = {name: read_metrics(run) for name, run in names.items()}
    for name, run in names.items():
        check_validated(run, metrics[name], "spec_decode.fit", "val/tau")
    if len(targets := {model["target"]["name"] for model in models.values()}) > 1:
        raise UserError(f"these runs are for different targets ({', '.join(sorted(targets))}); report on them apart")
    table = [
        {
            "run": name,
            "drafter": model["drafter"]["name"],
            "options": ", ".join(f"{key} {value}" for key, value in (model["drafter"]["options"] or {}).items()),
            "updates": f"{metrics[name]['val/tau'][0][-1] + 1:.0f}",
            "tau, validation": f"{metrics[name]['val/tau'][1][-1]:.2f}",
        }
        for name, model in models.items()
    ]
    sections = [
        Section("Runs", f"Target: {targets.pop()}. tau: tokens per target pass, accepted + 1.", table=table),
        Section("Training", "Dark: the first level; light: the last.", plot_training(metrics)),
    ]
    if count:
        texts: Sequence[str | Row] = packaged_prompts()[::-1] if prompts is None else read_prompts(prompts)
        texts = texts[:count]
        measured, pictures, tokenizer = decode(names, texts, tree=tree, max_new_tokens=max_new_tokens)
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
        about = f"{len(texts)} prompts, greedy, up to {max_new_tokens} tokens each, tree {tree or '3,2,...'}."
        sections += [
            Section("Acceptance while decoding", about, plot_acceptance(measured)),
            Section("Where the time goes", about, plot_time(measured), speeds),
        ]
        for name, passes in pictures.items():
            if passes.kept:
                text = "The first passes of the first prompt: what was drafted, and in green what the target accepted."
                sections.append(Section(f"Draft trees of {name}", text, plot_trees(passes.kept, tokenizer)))
    return write_report(output, "Drafting with " + ", ".join(names), sections)


def main(args: list[str] | None = None) -> Path:
    """Parse the command line, write the report and say where it is."""
    parser = CommandParser(prog="python -m spec_decode.report", description=__doc__, allow_abbrev=False)
    parser.example = "runs/smollm2/run_0"
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument("--output", type=Path, default=Path("runs/report/spec_decode"), help="Folder of the page.")
    parser.add_argument("--prompts", type=Path | None, default=None, help="JSONL file; packaged prompts by default.")
    parser.add_argument("--count", type=int, default=4, help="Prompts that are decoded; 0 for none.")
    parser.add_argument(
        "--tree", type=str | None, default=None, help="Tree to draft, as in spec_decode.generate; by default 3,2,2,..."
    )
    parser.add_argument("--max_new_tokens", type=int, default=96, help="Tokens per prompt.")
    settings = parser.parse_args(args)
    check_folder("--output", settings.output)
    page = report(
        settings.runs,
        settings.output,
        prompts=settings.prompts,
        count=settings.count,
        tree=settings.tree,
        max_new_tokens=settings.max_new_tokens,
    )
    Console().print(printable(f"written to {page}"), markup=False, soft_wrap=True, highlight=False)
    return page


if __name__ == "__main__":
    run_command(main)
