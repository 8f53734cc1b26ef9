"""The table at the end of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vision_kd.training import ComponentTraining

if TYPE_CHECKING:
    from vision_kd.fit import Result


def print_summary(result: "Result", model: ComponentTraining, console: Console | None = None) -> None:
    """Print what a run achieved: metrics, gradient signal-to-noise ratios, costs and where its files lie.

    Args:
        result: The run's result.
        model: The trained module, for the names of method and policy.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    table = Table(title=f"{type(model.method).__name__} with {type(model.policy).__name__}", show_header=True)
    for column in ("", *model.metrics.values(), "parameters"):
        table.add_column(column, justify="left" if not column else "right")
    parameters = {name: f"{count:,}" for name, count in result.parameters.items()}

    def row(title: str, metrics: Mapping[str, float], count: str = "") -> None:
        table.add_row(title, *(percentage(metrics, name) for name in model.metrics), count)

    if result.teacher:
        spec = model.teacher_spec
        assert spec is not None
        row(f"teacher {spec.name}", result.teacher, parameters["teacher"])
    student = f"student {model.student_spec.name}"
    if result.alone is not None:
        row(f"{student} alone, last epoch", result.alone.last)
    row(f"{student}, last epoch", result.last, parameters["student"])
    row(f"{student}, best epoch ({result.best['epoch'] + 1:.0f})", result.best)
    console.print(table)

    noise = f"(pure noise reads about {1 / result.last['gsnr_samples']:.2f})" if result.gsnr else ""
    lines = {f"GSNR of {name}, last epoch": f"{value:.3f} {noise}" for name, value in result.gsnr.items()}
    if result.k is not None:
        lines["k reached"] = f"{result.k} of {model.num_classes - 1} non-target classes"
    lines["seconds per epoch"] = f"{result.seconds_per_epoch:.2f}"
    if result.teacher:
        lines["teacher weights"] = result.teacher["origin"]
    if result.run_dir is not None:
        lines["student weights"] = str(result.run_dir / "student_{last,best}.pt")
        lines["to resume"] = f"--ckpt_path {result.run_dir / 'checkpoints' / 'last.ckpt'} --trainer.max_epochs ..."
        lines["logs"] = f"{result.run_dir / 'metrics.csv'}, tensorboard --logdir {result.run_dir}"
        lines["configuration"] = str(result.run_dir / "config.yaml")
    for name, value in lines.items():
        console.print(f"{name:<{max(map(len, lines))}}  {value}", soft_wrap=True, highlight=False)


def percentage(metrics: Mapping[str, float], name: str) -> str:
    """A metric in per cent; a dash where the data have nothing to measure it on."""
    return f"{metrics[name]:.2%}" if name in metrics else "–"
