"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console

from kd_common.run.summary import files_of_run, print_lines, print_table
from vision_kd.training.component_training import ComponentTraining
from vision_kd.training.result import Result


def print_summary(result: Result, model: ComponentTraining, console: Console | None = None) -> None:
    """Print what a run achieved: metrics, gradient signal-to-noise ratios, costs and where its files lie.

    Args:
        result: The run's result.
        model: The trained module, for the names of method and policy.
        console: Where to print; standard output by default.
    """
    wide = len(model.metrics) > 2  # a table of names, six metrics and parameter counts would not fit a terminal
    parameters = {name: f"{count:,}" for name, count in result.parameters.items()}
    networks = {"student": model.student_spec.name}
    if result.teacher:
        assert model.teacher_spec is not None
        networks["teacher"] = model.teacher_spec.name

    def row(who: str, suffix: str, metrics: Mapping[str, float], count: str = "") -> dict[str, str]:
        cells = {"": f"{who}{'' if wide else ' ' + networks[who]}{suffix}"}
        cells |= {title: percentage(metrics, name, 1 if wide else 2) for name, title in model.metrics.items()}
        return cells if wide else cells | {"parameters": count}

    rows = [row("teacher", "", result.teacher, parameters["teacher"])] if result.teacher else []
    if result.alone is not None:
        rows.append(row("student", " alone, last", result.alone.last))
    rows.append(row("student", ", last epoch", result.last, parameters["student"]))
    rows.append(row("student", f", best epoch ({result.best['epoch'] + 1:.0f})", result.best))
    print_table(title(model), rows, console)

    noise = f"(pure noise reads about {1 / result.last['gsnr_samples']:.2f})" if result.gsnr else ""
    lines = {f"GSNR of {name}, last epoch": f"{value:.3f} {noise}" for name, value in result.gsnr.items()}
    if result.k is not None:
        lines["k reached"] = f"{result.k} of {model.num_classes - 1} non-target classes"
    if wide:
        lines |= {who: f"{name}, {parameters[who]} parameters" for who, name in networks.items()}
    lines["seconds per epoch"] = f"{result.seconds_per_epoch:.2f}"
    if result.teacher:
        lines["teacher weights"] = result.teacher["origin"]
    print_lines(lines | files_of_run(result.run_dir, model.export_name), console)


def title(model: ComponentTraining) -> str:
    """Return the title of the table: method, policy, and every other setting that changes loss or weights."""
    extras = {
        "standardised logits": getattr(model.method, "standardize", False),
        "top-k mask": model.topk is not None,
        "FPN features": "feature" in model.components,
        "moving average": model.ema is not None,
    }
    return ", ".join(
        [
            f"{type(model.method).__name__} with {type(model.policy).__name__}",
            *(name for name, used in extras.items() if used),
        ]
    )


def percentage(metrics: Mapping[str, float], name: str, digits: int = 2) -> str:
    """Return a metric in per cent; a dash where the data have nothing to measure it on."""
    return f"{metrics[name]:.{digits}%}" if name in metrics else "–"
