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
from pathlib import Path

import torch

from kd_common.run.compare import Row, by_variant, compare_command, mean_and_spread, write_table
from kd_common.run.errors import run_command
from vision_kd.fit import CONFIG_DIR, build, run
from vision_kd.viz.comparison import plot_accuracy, plot_gsnr


def run_one(variant: str, seed: int, args: Sequence[str], threads: int) -> Row:
    """Train one variant with one seed; return what the table and the plots need, in plain types.

    Args:
        variant: Name in the table.
        seed: ``seed_everything`` of the run.
        args: Command line of :func:`vision_kd.fit.build`.
        threads: CPU threads of this run.
    """
    torch.set_num_threads(threads)
    cli = build([*args, "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"])
    result = run(cli)
    return {
        "variant": variant,
        "seed": seed,
        "metrics": cli.model.metrics,
        "teacher": result.teacher,
        "parameters": result.parameters,
        "history": result.history,
        "args": list(args),
    }


def headline(row: Row) -> str:
    """The first metric of a finished run."""
    name, header = next(iter(row["metrics"].items()))
    return f"{header} {row['history'][-1][name]:.2%}"


def per_cent(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    return mean_and_spread([100 * value for value in values])


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One table row per variant: accuracies over the seeds and cost."""
    lines = []
    for variant, runs in by_variant(rows).items():
        metrics = runs[0]["metrics"]
        judged, header = next(iter(metrics.items()))
        last = [run["history"][-1] for run in runs]
        best = [max(run["history"], key=lambda epoch: epoch[judged]) for run in runs]
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
        seconds = [epoch["seconds"] for run in runs for epoch in run["history"]]
        lines.append(line | {"s/epoch": f"{statistics.fmean(seconds):.1f}"})
    return lines


def report(rows: Sequence[Row], output: Path) -> None:
    """Print the table and write it beside the plots."""
    write_table(summarise(rows), output / "results.md", "validation metrics in %, mean ± standard deviation over seeds")
    plot_accuracy(rows, output / "accuracy.png")
    if any(key.startswith("gsnr/") for row in rows for key in row["history"][-1]):
        plot_gsnr(rows, output / "gsnr.png")


def main(args: list[str] | None = None) -> list[Row]:
    """Parse the comparison and run it."""
    return compare_command(
        run_one, headline, report, package="vision_kd", description=__doc__, config_dir=CONFIG_DIR, args=args
    )


if __name__ == "__main__":
    run_command(main)
