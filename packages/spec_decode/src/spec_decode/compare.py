"""`python -m spec_decode.compare --config FILE`: drafters and their settings trained alike over seeds, in one table.

A comparison file names the configurations all runs share and those each variant adds::

    base: [default]
    variants:
      FastEagle: [drafters/fast_eagle]
      stem of one layer: ["--model.drafter.stem=1"]
    seeds: [0, 1, 2]

The target's text and features are written once, by the first run. Every finished run is written to `results.json` at
once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.compare")  # before the imports below, which take seconds

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

from kd_common.run.compare import ComparedRun, compare_command, mean_and_spread
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

    title = "held-out text; tau: tokens per pass of a chain, accepted + 1"
    draft_seconds: float
    pass_seconds: float

    @classmethod
    def train(cls, args: list[str], **place: Any) -> Self:
        """Train one run and time its drafter."""
        cli = build([*args, "--measure_prompts=0"])
        result = run(cli)
        target, drafter = cli.model.target, for_inference(cli.model.drafter)
        for model in (target, drafter):
            model.pack()
        draft_seconds = measure_drafts(target, drafter, drafter.depth)[-1]
        pass_seconds = measure_passes(target, (1,))[1]
        return cls.of(result, args=args, draft_seconds=draft_seconds, pass_seconds=pass_seconds, **place)

    @property
    def headline(self) -> str:
        """Return the tokens per target pass."""
        return f"tau {self.last['tau']:.3f}"

    @classmethod
    def cells(cls, runs: Sequence[Self]) -> dict[str, str]:
        """Acceptance by level and tau at the last and best epoch, and what a draft costs."""
        last = [run.last for run in runs]
        levels = range(len(last[0]["acceptance"]))
        return {
            "parameters, M": f"{runs[0].parameters['drafter'] / 1e6:.1f}",
            "acceptance by level, %": " ".join(
                mean_and_spread([100 * epoch["acceptance"][level][0] for epoch in last], 1) for level in levels
            ),
            "tau, last": mean_and_spread([epoch["tau"] for epoch in last], 3),
            "tau, best": mean_and_spread([max(epoch["tau"] for epoch in run.history) for run in runs], 3),
            "draft, x T(1)": mean_and_spread([run.draft_seconds / run.pass_seconds for run in runs], 2),
            "training, s": f"{fmean(sum(epoch['seconds'] for epoch in run.history) for run in runs):.0f}",
        }


def main(args: list[str] | None = None) -> list[DrafterRun]:
    """Parse the comparison and run it."""
    return compare_command(DrafterRun, package="spec_decode", description=__doc__, config_dir=CONFIG_DIR, args=args)


if __name__ == "__main__":
    run_command(main)
