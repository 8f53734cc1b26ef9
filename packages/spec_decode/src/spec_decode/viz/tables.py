"""Tables of a benchmark, narrow enough for a terminal of 80 columns."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_common.terminal import printable

Row = dict[str, Any]
PHASES = ("draft", "target", "verify", "commit", "overhead")


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Return the lines of a report: one per decoder under its prompt set and temperature.

    Args:
        rows: Rows of `benchmark`, grouped by set and temperature.
        console: Where to print.
    """
    speeds: dict[str, Callable[[Row], str]] = {
        "tokens/s": lambda row: _number(row.get("tokens_per_second"), ".1f"),
        "speed-up": lambda row: _number(row.get("speedup"), ".2f", "x"),
        "end to end": lambda row: _number(row["end_to_end"], ".1f"),
        "x transf.": lambda row: _number(row.get("speedup_over_transformers"), ".2f", "x"),
        "tau": lambda row: _number(row.get("tau"), ".2f"),
        "lossless": lambda row: "{equal}/{of}".format(**verdict) if (verdict := row.get("lossless")) else "",
    }
    _print(
        rows,
        speeds,
        "tokens/s: behind the prefill; speed-up: over plain decoding on the same runner; end to end: tokens/s with the "
        "prefill; x transf.: that over transformers' generate; tau: tokens per target pass, accepted + 1; lossless: "
        "texts equal to plain decoding's",
        console,
    )
    details: dict[str, Callable[[Row], str]] = {
        "tree": lambda row: _tree(row["tree"]),
        "acceptance": lambda row: " ".join(f"{a:.2f}" for a in row["acceptance"]),
        "time, %": _shares,
        "of model": lambda row: _number(row["share_of_cost_model"], ".0%"),
        "MiB": lambda row: f"{row['drafter_mib']:.0f} + {row['decoding_mib']:.0f}",
    }
    _print(
        [row for row in rows if "tree" in row],
        details,
        "tree: candidates per level; acceptance: by level; time: draft, target pass, verification, commit, rest; of "
        "model: share of the speed-up tau T(1) / (T_draft + T(n)) that was reached, far from 100% where a machine "
        "changes its speed; MiB: the drafter's weights + peak while decoding",
        console,
    )


def _print(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]], caption: str, console: Console) -> None:
    for (name, temperature), block in groupby(rows, lambda row: (row["set"], row["temperature"])):
        title = f"{escape(printable(name))}, temperature {temperature:g}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("decoder", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=column not in ("tree", "acceptance"))
        for row in block:
            table.add_row(escape(printable(row["drafter"])), *(show(row) for show in columns.values()))
        console.print(table)
    console.print(f"{caption}\n", style="italic", highlight=False)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _tree(tree: Sequence[int] | dict[str, int]) -> str:
    if isinstance(tree, dict):
        return "dynamic " + ",".join(map(str, tree.values()))
    return ",".join(map(str, tree)) or "none"


def _shares(row: Row) -> str:
    seconds = [row["seconds"][phase] for phase in PHASES]
    total = sum(seconds)
    return " ".join(f"{100 * part / total:.0f}" for part in seconds) if total else ""
