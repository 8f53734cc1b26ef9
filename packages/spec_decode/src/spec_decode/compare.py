"""``python -m spec_decode.compare --config FILE``: drafters and their settings trained alike over seeds, in one table.

A comparison file names the configurations all runs share and those each variant adds::

    base: [default]
    variants:
      FastEagle: [drafters/fast_eagle]
      stem of one layer: ["--model.drafter.stem=1"]
    seeds: [0, 1, 2]

The target's text and features are written once, by the first run. Every finished run is written to ``results.json`` at
once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.compare")  # before the imports below, which take seconds

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kd_common.run.compare import ComparedRun, by_variant, compare_command, mean_and_spread, write_table
from kd_common.run.errors import run_command
from spec_decode.decoding.autotune import measure_drafts, measure_passes
from spec_decode.drafters.files import for_inference
from spec_decode.fit import CONFIG_DIR, build, run


@dataclass(frozen=True, kw_only=True)
class DrafterRun(ComparedRun):
    """A finished run of a drafter.

    Attributes:
        draft_seconds: Time to draft all levels.
        pass_seconds: Time of a pass of the target over one token.
    """

    draft_seconds: float
    pass_seconds: float

    @property
    def headline(self) -> str:
        """Tokens per target pass."""
        return f"tau {self.last['tau']:.3f}"


def run_one(variant: str, seed: int, args: list[str]) -> DrafterRun:
    """Train one variant with one seed, and time its draft.

    Args:
        variant: Name in the table.
        seed: Seed of the run.
        args: Command line of :func:`spec_decode.fit.build`.
    """
    cli = build([*args, "--measure_prompts=0"])
    result = run(cli)
    target = cli.model.target
    drafter = for_inference(cli.model.drafter)
    for model in (target, drafter):
        model.pack()
    return DrafterRun(
        variant=variant,
        seed=seed,
        args=args,
        history=result.history,
        parameters=result.parameters,
        draft_seconds=measure_drafts(target, drafter, drafter.depth)[-1],
        pass_seconds=measure_passes(target, (1,))[1],
    )


def report(compared: Sequence[DrafterRun], output: Path) -> None:
    """Print the table and write it."""
    title = "held-out text, mean ± standard deviation over seeds; tau: tokens per pass of a chain, accepted + 1"
    write_table(summarise(compared), output / "results.md", title)


def summarise(compared: Sequence[DrafterRun]) -> list[dict[str, str]]:
    """One table row per variant: acceptance by level and tau at the last and best epoch, and what a draft costs."""
    lines = []
    for variant, runs in by_variant(compared).items():
        last = [run.last for run in runs]
        levels = range(len(last[0]["acceptance"]))
        lines.append(
            {
                "variant": variant,
                "seeds": str(len(runs)),
                "parameters, M": f"{runs[0].parameters['drafter'] / 1e6:.1f}",
                "acceptance by level, %": " ".join(
                    mean_and_spread([100 * epoch["acceptance"][level][0] for epoch in last], 1) for level in levels
                ),
                "tau, last": mean_and_spread([epoch["tau"] for epoch in last], 3),
                "tau, best": mean_and_spread([max(epoch["tau"] for epoch in run.history) for run in runs], 3),
                "draft, x T(1)": mean_and_spread([run.draft_seconds / run.pass_seconds for run in runs], 2),
                "training, s": f"{fmean(sum(epoch['seconds'] for epoch in run.history) for run in runs):.0f}",
            }
        )
    return lines


def main(args: list[str] | None = None) -> list[DrafterRun]:
    """Parse the comparison and run it."""
    return compare_command(
        DrafterRun, run_one, report, package="spec_decode", description=__doc__, config_dir=CONFIG_DIR, args=args
    )


if __name__ == "__main__":
    run_command(main)
