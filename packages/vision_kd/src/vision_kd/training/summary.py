"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_common.run.checkpoints import files_of_run
from kd_common.terminal import printable
from vision_kd.training.component_training import ComponentTraining
from vision_kd.training.result import Result


def print_summary(result: Result, model: ComponentTraining, console: Console | None = None) -> None:
    """Print what a run achieved: metrics, gradient signal-to-noise ratios, costs and where its files lie.

    Args:
        result: The run's result.
        model: The trained module, for the names of method and policy.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    wide = len(model.metrics) > 2  # a table of names, six metrics and parameter counts would not fit a terminal
    table = Table(title=title(model), show_header=True)
    table.add_column("", overflow="fold")  # a long name takes several lines, a number never
    for column in (*model.metrics.values(), *([] if wide else ["parameters"])):
        table.add_column(column, justify="right", no_wrap=True)
    parameters = {name: f"{count:,}" for name, count in result.parameters.items()}
    networks = {"student": model.student_spec.name}
    if result.teacher:
        assert model.teacher_spec is not None
        networks["teacher"] = model.teacher_spec.name

    def row(who: str, suffix: str, metrics: Mapping[str, float], count: str = "") -> None:
        title = f"{who}{'' if wide else ' ' + networks[who]}{suffix}"
        shown = [percentage(metrics, name, digits=1 if wide else 2) for name in model.metrics]
        table.add_row(title, *shown, *([] if wide else [count]))

    if result.teacher:
        row("teacher", "", result.teacher, parameters["teacher"])
    if result.alone is not None:
        row("student", " alone, last", result.alone.last)
    row("student", ", last epoch", result.last, parameters["student"])
    row("student", f", best epoch ({result.best['epoch'] + 1:.0f})", result.best)
    console.print(table)

    noise = f"(pure noise reads about {1 / result.last['gsnr_samples']:.2f})" if result.gsnr else ""
    lines = {f"GSNR of {name}, last epoch": f"{value:.3f} {noise}" for name, value in result.gsnr.items()}
    if result.k is not None:
        lines["k reached"] = f"{result.k} of {model.num_classes - 1} non-target classes"
    if wide:
        lines |= {who: f"{name}, {parameters[who]} parameters" for who, name in networks.items()}
    lines["seconds per epoch"] = f"{result.seconds_per_epoch:.2f}"
    if result.teacher:
        lines["teacher weights"] = result.teacher["origin"]
    if result.run_dir is not None:
        # A resumed run has no best student where the best epoch came before it and its file is not there.
        found = ",".join(which for which in ("last", "best") if (result.run_dir / f"student_{which}.pt").is_file())
        lines["student weights"] = f"{result.run_dir}/student_{{{found}}}.pt"
        lines |= files_of_run(result.run_dir, " --trainer.max_epochs ...")
    for name, value in lines.items():
        console.print(f"{name:<{max(map(len, lines))}}  {escape(printable(value))}", soft_wrap=True, highlight=False)


def title(model: ComponentTraining) -> str:
    """What the student was trained with: method, policy and what else changes its loss or its weights."""
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
    """A metric in per cent; a dash where the data have nothing to measure it on."""
    return f"{metrics[name]:.{digits}%}" if name in metrics else "–"
