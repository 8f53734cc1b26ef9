"""Variants times seeds: run what is missing, keep every finished run, write one table.

What a run is and which numbers it yields is the caller's; a method package wraps this in its ``compare`` command.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.files import read_json, write_atomically
from kd_common.run.cli import resolve_config_names
from kd_common.run.imports import asked_for, import_asked_for, refuse_imports
from kd_common.run.messages import CommandParser, check_folder
from kd_common.run.summary import print_table

Row = dict[str, Any]
RunOne = Callable[[str, int, Sequence[str], int], Row]


def run_matrix(
    run_one: RunOne,
    headline: Callable[[Row], str],
    *,
    base: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    output: Path,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    jobs: int = 1,
) -> list[Row]:
    """Run every variant with every seed; every finished run is in ``results.json`` at once.

    Args:
        run_one: Called with variant, seed, command line and number of CPU threads; returns plain types with at least
            ``variant``, ``seed`` and ``args``. A function of a module, so that other processes find it.
        headline: One line about a finished run.
        base: Configurations all runs share.
        variants: Further configurations of each variant, by the name it has in the table; an entry that starts with
            ``--`` is a command-line argument instead.
        output: Folder of the runs, ``results.json``, the table and the plots.
        seeds: One run per seed and variant.
        overrides: Command-line arguments added to all runs, such as ``--trainer.max_epochs=2``.
        jobs: Runs at a time; the CPU's threads are shared among them.

    Returns:
        One row per run, in the order of the variants and seeds.

    Raises:
        UserError: If ``results.json`` is damaged, or holds a run with other settings, or if there is nothing to run.
        ExceptionGroup: Of the runs that failed, after the others are saved; with one job at a time the first failure
            ends the comparison.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give the number of runs at a time, 1 or more")
    if not seeds:
        raise UserError("--seeds []: give at least one, as in '[0]': every variant runs once per seed")
    if not variants:
        raise UserError("--variants {}: give at least one, as in '{KD: [methods/kd]}'")
    for setting, given in {"--base": base, "--overrides": overrides, **variants}.items():
        refuse_imports(setting, given)
    check_folder("--output", output)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.json"
    done = _finished(results) if results.is_file() else []
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
                raise UserError(
                    f"{results} holds {variant}, seed {seed}, run with other settings ({' '.join(earlier)}); "
                    "choose another output folder or delete that file"
                )
    with tqdm(total=len(pending), unit="run") as progress:
        for row in _execute(run_one, pending, jobs):
            done.append(row)
            write_atomically(results, json.dumps({"environment": environment(), "runs": done}, indent=1))
            progress.write(f"{row['variant']}, seed {row['seed']}: {headline(row)}")
            progress.update()
    names = list(variants)
    done.sort(key=lambda row: (names.index(row["variant"]) if row["variant"] in names else len(names), row["seed"]))
    return done


def _finished(results: Path) -> list[Row]:
    """Rows of an earlier comparison."""
    hint = "choose another output folder, or delete that file to run everything again"
    rows = read_json(results, hint).get("runs")
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and {"variant", "seed", "args"} <= r.keys() for r in rows
    ):
        raise UserError(f"{results} is damaged: it holds no list of runs; {hint}")
    return rows


def compare_command(
    run_one: RunOne,
    headline: Callable[[Row], str],
    report: Callable[[Sequence[Row], Path], None],
    *,
    package: str,
    description: str | None,
    config_dir: Path,
    args: list[str] | None = None,
) -> list[Row]:
    """The ``compare`` command of a package: parse, run the matrix, report.

    Args:
        run_one: See `run_matrix`.
        headline: See `run_matrix`.
        report: Called with all rows and the output folder; prints the table and writes it beside the plots.
        package: Name of the package.
        description: Shown by ``--help``.
        config_dir: Where packaged comparisons are found by name.
        args: Command line; None for ``sys.argv``.
    """
    parser = CommandParser(prog=f"python -m {package}.compare", description=description, allow_abbrev=False)
    packaged = sorted(f"compare/{path.stem}" for path in (config_dir / "compare").glob("*.yaml"))
    parser.example = f"--config FILE of base, variants and output, packaged: {', '.join(packaged)}"
    parser.add_argument("--config", action="config", help="Comparison file; packaged ones are found by name.")
    parser.add_function_arguments(run_matrix, as_positional=False, skip={"run_one", "headline"})
    settings = parser.parse_args(resolve_config_names(sys.argv[1:] if args is None else args, config_dir))
    settings.pop("config")
    settings = parser.instantiate_classes(settings)
    rows = run_matrix(run_one, headline, **settings)
    report(rows, settings.output)
    print(f"written to {settings.output}")
    return rows


def _execute(run_one: RunOne, pending: Sequence[tuple[str, int, list[str], int]], jobs: int) -> Iterable[Row]:
    """Rows of all runs as they finish, in this process or in ``jobs`` fresh ones."""
    if jobs == 1:
        yield from (run_one(*arguments) for arguments in pending)
        return
    failures = []
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, fresh, initializer=import_asked_for, initargs=(asked_for(),)) as pool:
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


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of every variant, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation; the mean alone for a single value, a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_table(lines: Sequence[Mapping[str, str]], path: Path, title: str) -> None:
    """Print a table, one mapping from column to cell per line, and write it as Markdown."""
    print_table(title, lines)
    columns = list(lines[0])
    cells = [columns, ["---"] * len(columns), *(list(line.values()) for line in lines)]
    write_atomically(path, "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n")
