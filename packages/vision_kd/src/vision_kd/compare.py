"""``python -m vision_kd.compare --config FILE``: several methods, several seeds, one table and two plots.

A comparison file names the configurations all runs share and those each variant adds::

    base: [fashion_mnist]
    variants:
      KD: [methods/kd, policies/sgd]
      KD + DeepKD: [methods/kd, policies/deepkd]
    seeds: [0, 1, 2]

Every finished run is written to ``results.json`` at once; an interrupted comparison continues where it stopped.
"""

import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from kd_common.cli import resolve_config_names
from kd_common.files import write_atomically
from vision_kd.figures import plot_accuracy, plot_gsnr
from vision_kd.fit import CONFIG_DIR, build, run

Row = dict[str, Any]


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


def compare(
    base: list[str],
    variants: dict[str, list[str]],
    output: Path,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (a default the command line prints)
    overrides: list[str] = [],  # noqa: B006
    jobs: int = 1,
) -> list[Row]:
    """Run every variant with every seed and write the table and the plots.

    Args:
        base: Configurations all runs share.
        variants: Further configurations of each variant, by the name it has in the table; an entry that starts with
            ``--`` is a command-line argument instead.
        output: Folder of the runs, ``results.json``, ``results.md``, ``accuracy.png`` and ``gsnr.png``.
        seeds: One run per seed and variant.
        overrides: Command-line arguments added to all runs, such as ``--trainer.max_epochs=2``.
        jobs: Runs at a time; the CPU's threads are shared among them.

    Returns:
        One row per run.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.json"
    done = json.loads(results.read_text())["runs"] if results.is_file() else []
    finished = {(row["variant"], row["seed"]): row["args"] for row in done}
    threads = max(1, torch.get_num_threads() // jobs)  # OMP_NUM_THREADS stays the upper limit
    pending = []
    for variant, configs in variants.items():
        for seed in seeds:
            args = [f"--config={name}" if not name.startswith("--") else name for name in (*base, *configs)]
            run_dir = output / "runs" / f"{variant.replace(' ', '_').replace('/', '-')}-{seed}"
            args += [f"--run_dir={run_dir}", *overrides]
            earlier = finished.get((variant, seed))
            if earlier is None:
                pending.append((variant, seed, args, threads))
            elif earlier != args:
                raise ValueError(
                    f"{results} holds {variant}, seed {seed}, run with other settings ({' '.join(earlier)}); "
                    "choose another output folder or delete that file"
                )
    with tqdm(total=len(pending), unit="run") as progress:
        for row in execute(pending, jobs):
            done.append(row)
            write_atomically(results, json.dumps({"environment": environment(), "runs": done}, indent=1))
            name, header = next(iter(row["metrics"].items()))
            progress.write(f"{row['variant']}, seed {row['seed']}: {header} {row['history'][-1][name]:.2%}")
            progress.update()
    done.sort(key=lambda row: (list(variants).index(row["variant"]) if row["variant"] in variants else 0, row["seed"]))
    report(done, output)
    return done


def execute(pending: Sequence[tuple[str, int, list[str], int]], jobs: int) -> Iterable[Row]:
    """Rows of all runs as they finish, in this process or in ``jobs`` fresh ones."""
    if jobs == 1:
        yield from (run_one(*arguments) for arguments in pending)
        return
    failures = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_one, *arguments) for arguments in pending]):
            try:
                row = future.result()
            except Exception as error:  # the runs beside it are worth keeping; raised together at the end
                failures.append(error)
            else:
                yield row
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(pending)} runs failed; the others are saved", failures)


def environment() -> dict[str, Any]:
    """Hardware and versions the numbers belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in per cent; the mean alone for a single value, a dash for none."""
    if not values:
        return "–"
    mean = 100 * statistics.fmean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {100 * statistics.stdev(values):.2f}"


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One table row per variant: accuracies over the seeds and cost."""
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    lines = []
    for variant, runs in by_variant.items():
        metrics = runs[0]["metrics"]
        judged, header = next(iter(metrics.items()))
        last = [run["history"][-1] for run in runs]
        best = [max(run["history"], key=lambda epoch: epoch[judged]) for run in runs]
        line = {
            "variant": variant,
            "seeds": str(len(runs)),
            f"last {header}": mean_and_spread([epoch[judged] for epoch in last]),
            f"best {header}": mean_and_spread([epoch[judged] for epoch in best]),
        }
        for name, title in list(metrics.items())[1:]:
            line[f"last {title}"] = mean_and_spread([epoch[name] for epoch in last if name in epoch])
        if "loss" in last[0]:
            line["last loss"] = f"{statistics.fmean(epoch['loss'] for epoch in last):.4f}"
        seconds = [epoch["seconds"] for run in runs for epoch in run["history"]]
        lines.append(line | {"s/epoch": f"{statistics.fmean(seconds):.1f}"})
    return lines


def report(rows: Sequence[Row], output: Path) -> None:
    """Print the table and write it beside the plots."""
    lines = summarise(rows)
    table = Table(title="validation metrics in %, mean ± standard deviation over seeds")
    for column in lines[0]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for line in lines:
        table.add_row(*(escape(value) for value in line.values()))
    Console().print(table)
    header = [list(lines[0]), ["---"] * len(lines[0])]
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in [*header, *(list(line.values()) for line in lines)])
    write_atomically(output / "results.md", markdown + "\n")
    plot_accuracy(rows, output / "accuracy.png")
    if any(key.startswith("gsnr/") for row in rows for key in row["history"][-1]):
        plot_gsnr(rows, output / "gsnr.png")
    Console().print(f"written to {output}", highlight=False)


def main(args: list[str] | None = None) -> list[Row]:
    """Parse the comparison and run it."""
    import sys

    parser = ArgumentParser(prog="python -m vision_kd.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Comparison file; packaged ones are found by name.")
    parser.add_function_arguments(compare, as_positional=False)
    command_line = sys.argv[1:] if args is None else args
    settings = parser.parse_args(resolve_config_names(command_line, CONFIG_DIR))
    settings.pop("config")
    return compare(**parser.instantiate_classes(settings))


if __name__ == "__main__":
    main()
