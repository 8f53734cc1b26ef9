"""Variants times seeds: run what is missing, keep every finished run, write one table.

What a run is and which numbers it yields is the caller's; a method package wraps this in its `compare` command.
"""

import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.files import read_json, write_atomically
from kd_common.run.cli import resolve_config_names
from kd_common.run.environment import environment
from kd_common.run.imports import asked_for, import_asked_for, refuse_imports
from kd_common.run.messages import CommandParser, check_folder
from kd_common.run.result import RunResult
from kd_common.run.summary import print_table


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A finished run of a comparison in plain types, as `results.json` keeps it; a package adds what its table needs.

    Attributes:
        title: Heading of the table.
        variant: Name in the table.
        seed: `seed_everything` of the run.
        args: Command line of the run.
        history: Metrics of every validation, in order.
        parameters: Number of parameters by model.
    """

    title: ClassVar[str]
    variant: str
    seed: int
    args: list[str]
    history: list[dict[str, Any]]
    parameters: dict[str, int]

    @classmethod
    def of(cls, result: RunResult, **row: Any) -> Self:
        """Keep what a run achieved; the other fields are given."""
        return cls(history=result.history, parameters=result.parameters, **row)

    @classmethod
    def train(cls, args: list[str], **place: Any) -> Self:
        """Train as a command line says, and return the record of it.

        Args:
            args: Command line of the package's `fit`.
            place: `variant` and `seed`, for the record.
        """
        raise NotImplementedError

    @classmethod
    def cells(cls, runs: Sequence[Self]) -> dict[str, str]:
        """Return what the table says of the runs of a variant, by column."""
        raise NotImplementedError

    @classmethod
    def plot(cls, variants: Mapping[str, Sequence[Self]], output: Path) -> None:
        """Draw what belongs beside the table into its folder."""

    @property
    def last(self) -> dict[str, Any]:
        """Return the metrics of the last validation."""
        return self.history[-1]

    @property
    def headline(self) -> str:
        """Return one line about the result."""
        raise NotImplementedError


R = TypeVar("R", bound=ComparedRun)


def run_matrix(
    record: type[R],
    *,
    base: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    output: Path,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    jobs: int = 1,
) -> list[R]:
    """Run every variant with every seed; every finished run is in `results.json` at once.

    Args:
        record: What trains, and is kept of a run; a class of a module, so that other processes find it.
        base: Configurations all runs share.
        variants: Further configurations of each variant, by the name it has in the table; an entry that starts with
            `--` is a command-line argument instead.
        output: Folder of the runs, `results.json`, the table and the plots.
        seeds: One run per seed and variant.
        overrides: Command-line arguments added to all runs, such as `--trainer.max_epochs=2`.
        jobs: Runs at a time; the CPU's threads are shared among them.

    Returns:
        One record per run, in the order of the variants and seeds.

    Raises:
        UserError: If `results.json` is damaged, or holds a run with other settings, or if there is nothing to run.
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
    done = _finished(results, record) if results.is_file() else []
    finished = {(run.variant, run.seed): run.args for run in done}
    pending = []
    for variant, configs in variants.items():
        for seed in seeds:
            args = [f"--config={name}" if not name.startswith("--") else name for name in (*base, *configs)]
            run_dir = output / "runs" / f"{variant.replace(' ', '_').replace('/', '-')}-{seed}"
            args += [f"--run_dir={run_dir}", *overrides]
            args += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
            earlier = finished.get((variant, seed))
            if earlier is None:
                pending.append((variant, seed, args))
            elif earlier != args:
                raise UserError(
                    f"{results} holds {variant}, seed {seed}, run with other settings ({' '.join(earlier)}); "
                    "choose another output folder or delete that file"
                )
    with tqdm(total=len(pending), unit="run") as progress:
        for run in _execute(record, pending, jobs):
            done.append(run)
            content = {"environment": environment(), "runs": [asdict(run) for run in done]}
            write_atomically(results, json.dumps(content, indent=1))
            progress.write(f"{run.variant}, seed {run.seed}: {run.headline}")
            progress.update()
    names = list(variants)
    done.sort(key=lambda run: (names.index(run.variant) if run.variant in names else len(names), run.seed))
    return done


def _finished(results: Path, record: type[R]) -> list[R]:
    """Runs of an earlier comparison."""
    hint = "choose another output folder, or delete that file to run everything again"
    try:
        return [record(**run) for run in read_json(results, hint)["runs"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{results} is damaged: it holds no list of runs ({error}); {hint}") from error


def compare_command(
    record: type[R],
    *,
    package: str,
    description: str | None,
    config_dir: Path,
    args: list[str] | None = None,
) -> list[R]:
    """Run the `compare` command of a package: parse, run the matrix, write the table and draw the plots.

    Args:
        record: See `run_matrix`.
        package: Name of the package.
        description: Shown by `--help`.
        config_dir: Where packaged comparisons are found by name.
        args: Command line; None for `sys.argv`.
    """
    parser = CommandParser(prog=f"python -m {package}.compare", description=description, allow_abbrev=False)
    packaged = sorted(f"compare/{path.stem}" for path in (config_dir / "compare").glob("*.yaml"))
    parser.example = f"--config FILE of base, variants and output, packaged: {', '.join(packaged)}"
    parser.add_argument("--config", action="config", help="Comparison file; packaged ones are found by name.")
    parser.add_function_arguments(run_matrix, as_positional=False, skip={"record"})
    settings = parser.parse_args(resolve_config_names(sys.argv[1:] if args is None else args, config_dir))
    settings.pop("config")
    settings = parser.instantiate_classes(settings)
    runs = run_matrix(record, **settings)
    variants = by_variant(runs)
    title = f"{record.title}, mean ± standard deviation over seeds"
    write_table(table(variants), settings.output / "results.md", title)
    record.plot(variants, settings.output)
    print(f"written to {settings.output}")
    return runs


def _execute(record: type[R], pending: Sequence[tuple[str, int, list[str]]], jobs: int) -> Iterable[R]:
    """Yield all runs as they finish, in this process or in `jobs` fresh ones."""
    if jobs == 1:
        yield from (_train(record, run) for run in pending)
        return
    failures = []
    fresh = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)  # OMP_NUM_THREADS stays the upper limit
    with ProcessPoolExecutor(jobs, fresh, initializer=_start, initargs=(threads, asked_for())) as pool:
        for future in as_completed([pool.submit(_train, record, run) for run in pending]):
            try:
                done = future.result()
            except Exception as error:  # the runs beside it are worth keeping; raised together at the end
                failures.append(error)
            else:
                yield done
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(pending)} runs failed; the others are saved", failures)


def _train(record: type[R], run: tuple[str, int, list[str]]) -> R:
    variant, seed, args = run
    return record.train(args, variant=variant, seed=seed)


def _start(threads: int, imports: Sequence[str]) -> None:
    """Prepare a fresh process."""
    torch.set_num_threads(threads)
    import_asked_for(imports)


def by_variant(runs: Sequence[R]) -> dict[str, list[R]]:
    """Return the runs of every variant, in order."""
    groups: dict[str, list[R]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def table(variants: Mapping[str, Sequence[R]]) -> list[dict[str, str]]:
    """Return one line per variant."""
    return [{"variant": variant, "seeds": str(len(runs)), **runs[0].cells(runs)} for variant, runs in variants.items()]


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and sample standard deviation; the mean alone for a single value, a dash for none."""
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
