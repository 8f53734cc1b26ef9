"""What a command prints at its end: a table, and lines of what else there is to say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_common.run.checkpoints import CHECKPOINT_DIR, CONFIG
from kd_common.run.export import exported
from kd_common.terminal import printable


def print_table(title: str, rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print a table.

    Args:
        title: Line above it.
        rows: One mapping from column to cell per line; at least one.
        console: Where to print; standard output by default.
    """
    table = Table(title=escape(printable(title)))
    for number, column in enumerate(rows[0]):
        # A long name takes several lines.
        table.add_column(column, justify="right" if number else "left", overflow="ellipsis" if number else "fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row.values()))
    (console or Console()).print(table)


def print_lines(lines: Mapping[str, str], console: Console | None = None) -> None:
    """Print names and values, the values below each other."""
    console = console or Console()
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(f"{name:<{width}}  {escape(printable(value))}", soft_wrap=True, highlight=False)


def files_of_run(run_dir: Path | None, model: str) -> dict[str, str]:
    """Lines for the end of a run: where model, logs and settings lie, and how to go on, as far as they were asked for.

    Args:
        run_dir: Folder of the run; None for one that wrote nothing.
        model: Name of an exported model; see `TrainingModule.export_name`.
    """
    if run_dir is None:
        return {}
    last, metrics = run_dir / CHECKPOINT_DIR / "last.ckpt", run_dir / "metrics.csv"
    lines = {f"{model.partition('_')[0]} weights": exported(run_dir, model)}
    if last.is_file():
        lines["to resume"] = f"--ckpt_path {last} --trainer.max_epochs ..."
    if metrics.is_file():
        lines["logs"] = f"{metrics}, tensorboard --logdir {run_dir}"
    return lines | {"configuration": str(run_dir / CONFIG)}
