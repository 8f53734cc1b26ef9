"""`python -m vision_kd.compare --config FILE`: several methods, several seeds, one table and two plots.

A comparison file names the configurations all runs share and those each variant adds::

    base: [fashion_mnist]
    variants:
      KD: [methods/kd, policies/sgd]
      KD + DeepKD: [methods/kd, policies/deepkd]
    seeds: [0, 1, 2]

Every finished run is written to `results.json` at once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("vision_kd.compare")  # before the imports below, which take seconds

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kd_common.run.compare import ComparedRun, compare_command, mean_and_spread
from kd_common.run.errors import run_command
from kd_common.run.result import best_epoch
from vision_kd.fit import CONFIG_DIR, build, run
from vision_kd.viz.comparison import plot_accuracy, plot_gsnr


@dataclass(frozen=True, kw_only=True)
class VisionRun(ComparedRun):
    """A finished run of a student.

    Attributes:
        metrics: Headers of the metrics by name, the one that validations are compared by first.
    """

    title = "validation metrics in %"
    metrics: dict[str, str]

    @classmethod
    def train(cls, args: list[str], **place: Any) -> Self:
        """Train one run."""
        cli = build(args)
        return cls.of(run(cli), args=args, metrics=cli.model.metrics, **place)

    @property
    def judged(self) -> str:
        """Return the metric that validations are compared by."""
        return next(iter(self.metrics))

    @property
    def headline(self) -> str:
        """Last value of that metric."""
        return f"{self.metrics[self.judged]} {self.last[self.judged]:.2%}"

    @classmethod
    def cells(cls, runs: Sequence[Self]) -> dict[str, str]:
        """Accuracies over the seeds and cost."""
        judged, metrics = runs[0].judged, runs[0].metrics
        header = metrics[judged]
        last = [run.last for run in runs]
        best = [best_epoch(run.history, judged, "max") for run in runs]
        line = {
            f"last {header}": per_cent([epoch[judged] for epoch in last]),
            f"best {header}": per_cent([epoch[judged] for epoch in best]),
        }
        for name, title in list(metrics.items())[1:]:
            line[f"last {title}"] = per_cent([epoch[name] for epoch in last if name in epoch])
        if "loss" in last[0]:
            line["last loss"] = f"{statistics.fmean(epoch['loss'] for epoch in last):.4f}"
        seconds = [epoch["seconds"] for run in runs for epoch in run.history]
        return line | {"s/epoch": f"{statistics.fmean(seconds):.1f}"}

    @classmethod
    def plot(cls, variants: Mapping[str, Sequence[Self]], output: Path) -> None:
        """Metric and, where it was measured, gradient signal-to-noise over the epochs."""
        histories = {variant: [run.history for run in runs] for variant, runs in variants.items()}
        first = next(iter(variants.values()))[0]
        plot_accuracy(histories, first.judged, first.metrics[first.judged], output / "accuracy.png")
        if any(key.startswith("gsnr/") for runs in variants.values() for run in runs for key in run.last):
            plot_gsnr(histories, output / "gsnr.png")


def per_cent(values: Sequence[float]) -> str:
    """Return the mean and sample standard deviation in per cent."""
    return mean_and_spread([100 * value for value in values])


def main(args: list[str] | None = None) -> list[VisionRun]:
    """Parse the comparison and run it."""
    return compare_command(VisionRun, package="vision_kd", description=__doc__, config_dir=CONFIG_DIR, args=args)


if __name__ == "__main__":
    run_command(main)
