"""`python -m llm_kd.compare --config FILE`: selectors, objectives and rollouts over seeds, one table and a plot.

A comparison file names the configurations all runs share and those each variant adds::

    base: [default]
    variants:
      uniform: [selectors/none]
      Top-k: [selectors/topk]
    seeds: [0, 1, 2]

Every finished run is written to `results.json` at once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.compare")  # before the imports below, which take seconds

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from matplotlib.figure import Figure

from kd_common.run.compare import ComparedRun, compare_command, mean_and_spread
from kd_common.run.errors import run_command
from llm_kd.fit import CONFIG_DIR, build, run
from llm_kd.training.summary import is_whole


@dataclass(frozen=True, kw_only=True)
class LanguageRun(ComparedRun):
    """A finished run of a student.

    Attributes:
        before: Validation means before training.
        rouge_l: ROUGE-L of the answers `before` and `after` training; empty if none were asked for.
    """

    title = "held-out responses"
    before: dict[str, float]
    rouge_l: dict[str, float]

    @classmethod
    def train(cls, args: list[str], **place: Any) -> Self:
        """Train one run."""
        result = run(build(args))
        rouge_l = {when: answers.rouge_l for when, answers in result.answers.items()}
        return cls.of(result, args=args, before=result.before, rouge_l=rouge_l, **place)

    @property
    def headline(self) -> str:
        """Distances to text and teacher."""
        return f"NLL {self.last['nll']:.3f}, KL {self.last['kl']:.3f}"

    @classmethod
    def cells(cls, runs: Sequence[Self]) -> dict[str, str]:
        """Distances at the last and the best (lowest KL) validation, ROUGE-L, TAR, cost."""
        last = [run.last for run in runs]
        best = [min(epoch["kl"] for epoch in run.history) for run in runs]
        bound = "" if all(map(is_whole, last)) else "≥ "  # a stored teacher that lacks tokens
        seconds = [sum(epoch["seconds"] for epoch in run.history) for run in runs]
        return {
            "NLL, last": mean_and_spread([epoch["nll"] for epoch in last], 3),
            "KL, last": bound + mean_and_spread([epoch["kl"] for epoch in last], 3),
            "KL, best": bound + mean_and_spread(best, 3),
            "agreement %": mean_and_spread([100 * epoch["agreement"] for epoch in last], 1),
            "ROUGE-L": mean_and_spread([run.rouge_l["after"] for run in runs if run.rouge_l], 1),
            "TAR %, last": mean_and_spread([100 * epoch["tar"] for epoch in last], 1),
            "accepted in training %, first → last": " → ".join(
                f"{100 * statistics.fmean(run.history[place]['train_tar'] for run in runs):.1f}" for place in (0, -1)
            ),
            "s": f"{statistics.fmean(seconds):.0f}",
        }

    @classmethod
    def plot(cls, variants: Mapping[str, Sequence[Self]], output: Path) -> None:
        """Plot the held-out top-5 token acceptance rate over the updates, as a mean over seeds."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for variant, runs in variants.items():
            steps = [0, *(epoch["step"] for epoch in runs[0].history)]
            curves = [[run.before["tar"], *(epoch["tar"] for epoch in run.history)] for run in runs]
            means = [100 * statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, means, ".-", label=variant)
        axes.set(xlabel="updates", ylabel="held-out tokens accepted among the top 5 (TAR), %", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2)
        figure.savefig(output / "tar.png", dpi=110)


def main(args: list[str] | None = None) -> list[LanguageRun]:
    """Parse the comparison and run it."""
    return compare_command(LanguageRun, package="llm_kd", description=__doc__, config_dir=CONFIG_DIR, args=args)


if __name__ == "__main__":
    run_command(main)
