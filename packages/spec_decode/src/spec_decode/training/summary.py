"""The table at the end of a run."""

from collections.abc import Sequence

from rich.console import Console

from kd_common.run.summary import files_of_run, print_lines, print_table
from spec_decode.training.drafter_module import DrafterModule
from spec_decode.training.result import Result


def print_summary(result: Result, model: DrafterModule, console: Console | None = None) -> None:
    """Print acceptance per level, tau, the measured speed-up, and where the files lie.

    Args:
        result: The run's result.
        model: The trained module.
        console: Where to print; standard output by default.
    """
    depth = len(result.last["acceptance"])

    def row(name: str, acceptance: Sequence[float], tau: float, speed: str = "", gain: str = "") -> dict[str, str]:
        levels = [f"{rate:.1%}" for rate in acceptance[:depth]] + [""] * (depth - len(acceptance))
        by_level = {f"level {number}": cell for number, cell in enumerate(levels, start=1)}
        return {"": name, **by_level, "tau": f"{tau:.2f}", "tokens/s": speed, "speed-up": gain}

    epochs = {"last epoch": result.last, f"best epoch ({result.best['epoch'] + 1})": result.best}
    rows = [
        row(f"validation, {name}", [level[0] for level in epoch["acceptance"]], epoch["tau"])
        for name, epoch in epochs.items()
    ]
    plain = result.measured.get("plain")
    for name, found in result.measured.items():
        label = f"decoding, tree {result.tree}" if name == "tree" else f"decoding, {name}"
        gain = found.speedup_over(plain) if plain else None
        speed = f"{found.tokens_per_second:.1f}"
        rows.append(row(label, found.acceptance, found.tau, speed, f"{gain:.2f}x" if gain else ""))
    print_table(f"{type(model.drafter).__name__} for {model.target_spec.name}", rows, console)
    lines = {
        "acceptance of a level": "given that all above were accepted (validation: best token, text of the target)",
        "tau": "tokens per target pass: accepted + 1 (validation: chain of all levels)",
        "parameters": f"drafter {result.parameters['drafter']:,}, target {result.parameters['target']:,} (frozen)",
        "seconds per epoch": f"{result.seconds_per_epoch:.1f}",
    }
    if result.measured:
        count = len(plain.texts) if plain else 0
        lines["speed-up"] = f"over plain decoding on the same runner, held-out prompts: {count}, greedy"
        lines["tree for this machine"] = str(result.tree or "none: plain decoding is expected to be faster")
    print_lines(lines | files_of_run(result.run_dir, model.export_name), console)
