"""``python -m vision_kd.compare --config FILE``: several methods, several seeds, one table and two plots.

A comparison file names the configurations all runs share and those each variant adds::

    base: [fashion_mnist]
    variants:
      KD: [methods/kd, policies/sgd]
      KD + DeepKD: [methods/kd, policies/deepkd]
    seeds: [0, 1, 2]

Every finished run is written to ``results.json`` at once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("vision_kd.compare")  # before the imports below, which take seconds

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_common.run.compare import ComparedRun, by_variant, compare_command, mean_and_spread, write_table
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

    metrics: dict[str, str]

    @property
    def judged(self) -> str:
        """The metric that validations are compared by."""
        return next(iter(self.metrics))

    @property
    def headline(self) -> str:
        """Last value of that metric."""
        return f"{self.metrics[self.judged]} {self.last[self.judged]:.2%}"


def run_one(variant: str, seed: int, args: list[str]) -> VisionRun:
    """Train one variant with one seed.

    Args:
        variant: Name in the table.
        seed: Seed of the run.
        args: Command line of :func:`vision_kd.fit.build`.
    """
    cli = build(args)
    result = run(cli)
    return VisionRun(
        variant=variant,
        seed=seed,
        args=args,
        history=result.history,
        parameters=result.parameters,
        metrics=cli.model.metrics,
    )


def per_cent(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    return mean_and_spread([100 * value for value in values])


def summarise(compared: Sequence[VisionRun]) -> list[dict[str, str]]:
    """One table row per variant: accuracies over the seeds and cost."""
    lines = []
    for variant, runs in by_variant(compared).items():
        judged, metrics = runs[0].judged, runs[0].metrics
        header = metrics[judged]
        last = [run.last for run in runs]
        best = [best_epoch(run.history, judged, "max") for run in runs]
        line = {
            "variant": variant,
            "seeds": str(len(runs)),
            f"last {header}": per_cent([epoch[judged] for epoch in last]),
            f"best {header}": per_cent([epoch[judged] for epoch in best]),
        }
        for name, title in list(metrics.items())[1:]:
            line[f"last {title}"] = per_cent([epoch[name] for epoch in last if name in epoch])
        if "loss" in last[0]:
            line["last loss"] = f"{statistics.fmean(epoch['loss'] for epoch in last):.4f}"
        seconds = [epoch["seconds"] for run in runs for epoch in run.history]
        lines.append(line | {"s/epoch": f"{statistics.fmean(seconds):.1f}"})
    return lines


def report(compared: Sequence[VisionRun], output: Path) -> None:
    """Print the table and write it beside the plots."""
    title = "validation metrics in %, mean ± standard deviation over seeds"
    write_table(summarise(compared), output / "results.md", title)
    histories = {variant: [run.history for run in runs] for variant, runs in by_variant(compared).items()}
    judged = compared[0].judged
    plot_accuracy(histories, judged, compared[0].metrics[judged], output / "accuracy.png")
    if any(key.startswith("gsnr/") for run in compared for key in run.last):
        plot_gsnr(histories, output / "gsnr.png")


def main(args: list[str] | None = None) -> list[VisionRun]:
    """Parse the comparison and run it."""
    return compare_command(
        VisionRun, run_one, report, package="vision_kd", description=__doc__, config_dir=CONFIG_DIR, args=args
    )


if __name__ == "__main__":
    run_command(main)
