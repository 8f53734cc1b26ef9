"""The table at the end of a run."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_common.run.checkpoints import files_of_run
from kd_common.terminal import printable
from spec_decode.training.drafter_module import DrafterModule
from spec_decode.training.result import Result


def print_summary(result: Result, model: DrafterModule, console: Console | None = None) -> None:
    """Print acceptance per level, tau, the measured speed-up, and where the files lie.

    Args:
        result: The run's result.
        model: The trained module.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    depth = len(result.last["acceptance"])
    table = Table(title=f"{type(model.drafter).__name__} for {escape(printable(model.target_spec.name))}")
    for column in ("", *(f"level {level}" for level in range(1, depth + 1)), "tau", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for name, epoch in {"last epoch": result.last, f"best epoch ({result.best['epoch'] + 1})": result.best}.items():
        levels = [f"{row[0]:.1%}" for row in epoch["acceptance"]]
        table.add_row(f"validation, {name}", *levels, *[""] * (depth - len(levels)), f"{epoch['tau']:.2f}", "", "")
    plain = result.measured.get("plain")
    for name, found in result.measured.items():
        levels = [f"{a:.1%}" for a in found.acceptance][:depth]
        label = f"decoding, tree {result.tree}" if name == "tree" else f"decoding, {name}"
        gain = found.speedup_over(plain) if plain else None
        speed = f"{found.tokens_per_second:.1f}"
        table.add_row(
            label, *levels, *[""] * (depth - len(levels)), f"{found.tau:.2f}", speed, f"{gain:.2f}x" if gain else ""
        )
    console.print(table)
    lines = {
        "acceptance of a level": "given that all above were accepted (validation: best token, text of the target)",
        "tau": "tokens per target pass: accepted + 1 (validation: chain of all levels)",
        "parameters": f"drafter {result.parameters['drafter']:,}, target {result.parameters['target']:,} (frozen)",
        "seconds per epoch": f"{sum(e['seconds'] for e in result.history) / len(result.history):.1f}",
    }
    if result.measured:
        count = len(plain.texts) if plain else 0
        lines["speed-up"] = f"over plain decoding on the same runner, held-out prompts: {count}, greedy"
        lines["tree for this machine"] = str(result.tree or "none: plain decoding is expected to be faster")
    if result.run_dir is not None:
        lines["drafter"] = str(result.run_dir / "drafter_{last,best}")
        lines |= files_of_run(result.run_dir)
    for name, value in lines.items():
        console.print(f"{name:<{max(map(len, lines))}}  {escape(printable(value))}", soft_wrap=True, highlight=False)
