"""`python -m vision_kd.report RUN...`: what runs did and why, as one self-contained HTML page.

From the logs: validation metric and k, GSNR beside the momenta, norms and cosines of the gradient components. From the
students of classifiers: correlation of logits beside the teacher's, calibration, change per class, loss landscapes.
Several runs are laid over each other; give them in the order in which they should be compared, the reference first.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("vision_kd.report")  # before the imports below, which take seconds

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.report import LoggedRun, Section, report_command
from vision_kd.data import ImageDataModule
from vision_kd.data.base import MissingDataError
from vision_kd.fit import VisionCLI, build
from vision_kd.models import Classifier, load_classifier
from vision_kd.models.classifier import DATA_SPEC
from vision_kd.training.classification import DistillationModule
from vision_kd.training.teacher import teacher_cache_path
from vision_kd.viz.diagnosis import calibration_error, class_accuracy, class_correlation, collect_logits
from vision_kd.viz.landscape import filter_direction, loss_surface
from vision_kd.viz.runs import (
    plot_class_changes,
    plot_component_gradients,
    plot_correlations,
    plot_landscapes,
    plot_progress,
    plot_reliability,
    plot_signal_to_noise,
)


class Run(LoggedRun):
    """A finished run of a student."""

    command = "vision_kd.fit"
    validated = ("val/top1", "val/AP")

    @cached_property
    def cli(self) -> VisionCLI:
        """Build its model and data anew; train and write nothing."""
        settings = [f"--config={self.folder / 'config.yaml'}", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
        return build([*settings, "--baseline=null", "--ckpt_path=null"])

    @property
    def classifies(self) -> bool:
        """Return whether the student is a classifier, whose logits can be compared."""
        return isinstance(self.cli.model, DistillationModule)

    def student(self) -> Classifier:
        """Return the student of the last epoch."""
        return load_classifier(self.folder / "student_last.pt")

    def teacher(self) -> Classifier | None:
        """Return the teacher, if its weights are at hand: a file, a library's, or in the cache; None otherwise."""
        spec = self.cli.model.teacher_spec
        if spec is None:
            return None
        if spec.checkpoint is not None or spec.pretrained:
            return DistillationModule.build(spec.model, **DistillationModule.data_spec(self.cli.datamodule))
        data = self.cli.datamodule
        try:
            path = teacher_cache_path(
                spec, data, data.settings, task=DistillationModule, ranks=self.cli.trainer.world_size
            )
        except MissingDataError:  # the training data are elsewhere
            return None
        return load_classifier(path) if path.is_file() else None

    def summary(self) -> dict[str, str]:
        """Line of the first table."""
        model = self.cli.model
        _, values = self.metrics[f"val/{model.metric}"]
        header = model.metrics[model.metric]
        return {
            "run": self.name,
            "method": type(model.method).__name__,
            "policy": type(model.policy).__name__,
            "mask": "none" if model.topk is None else f"dynamic, k_opt {model.topk.k_opt:g}",
            "student": model.student_spec.name,
            "teacher": model.teacher_spec.name if model.needs_teacher and model.teacher_spec else "none",
            f"last {header} %": f"{100 * values[-1]:.2f}",
            f"best {header} %": f"{100 * values.max():.2f}",
            "seed": str(self.cli.config["seed_everything"]),
        }


def log_sections(runs: Sequence[Run]) -> list[Section]:
    """Show the curves of the logs."""
    model = runs[0].cli.model
    metrics = {run.name: run.metrics for run in runs}
    text = "k is the number of non-target classes that the dynamic mask lets through."
    masked = any("train/k" in run.metrics for run in runs)
    sections = [
        Section("Runs", table=[run.summary() for run in runs]),
        Section(
            "Accuracy" if runs[0].classifies else "Average precision",
            text if masked else "",
            plot_progress(metrics, model.metric, model.metrics[model.metric]),
        ),
    ]
    figure = plot_signal_to_noise(metrics, {run.name: run.cli.model.momenta for run in runs})
    if figure is not None:
        sections.append(
            Section(
                "Gradient signal-to-noise",
                "Squared norm of the mean gradient over its variance, over the updates measured in an epoch. DeepKD "
                "gives components with a higher ratio a larger momentum. The dashed line is what noise without any "
                "signal reads with as many samples.",
                figure,
            )
        )
    gradients = plot_component_gradients(metrics)
    if gradients is not None:
        sections.append(
            Section(
                "Gradient components",
                "Every component's gradient by itself, before any momentum. Below a cosine of 0 they pull apart.",
                gradients,
            )
        )
    return sections


def student_sections(runs: Sequence[Run], *, resolution: int, extent: float, samples: int) -> list[Section]:
    """Compare the students of classifiers on the validation data of the first run."""
    data = runs[0].cli.datamodule
    data.prepare_data()
    data.setup("validate")
    networks: dict[str, Classifier] = {run.name: run.student() for run in runs}
    taught = next((run for run in runs if run.cli.model.needs_teacher), None)
    teacher = None if taught is None else taught.teacher()
    everyone = networks if teacher is None else {"teacher": teacher, **networks}
    shared = {name: getattr(data, name) for name in DATA_SPEC}
    for name, network in everyone.items():
        network.check_data(name, **shared)
    logits = {name: collect_logits(net, data.val_dataloader(), "cpu") for name, net in everyone.items()}
    sections = [*_comparisons(logits, data, list(networks), missing_teacher=taught is not None and teacher is None)]
    if resolution:
        sections.append(_landscapes(networks, data, resolution=resolution, extent=extent, samples=samples))
    return sections


def _comparisons(
    logits: Mapping[str, tuple[Tensor, Tensor]], data: ImageDataModule, students: list[str], *, missing_teacher: bool
) -> list[Section]:
    errors = [
        {
            "network": name,
            "top-1 %": f"{100 * float((z.argmax(-1) == y).float().mean()):.2f}",
            "mean confidence %": f"{100 * float(z.softmax(-1).amax(-1).mean()):.2f}",
            "calibration error %": f"{100 * calibration_error(z, y):.2f}",
        }
        for name, (z, y) in logits.items()
    ]
    correlations = {name: class_correlation(z).numpy() for name, (z, _) in logits.items()}
    text = "Which classes a network takes for similar: the closer a student's picture is to the teacher's, the more of "
    text += "its dark knowledge it has."
    if missing_teacher:
        text += " The teacher's weights are neither in a file nor in the cache, so its picture is missing."
    sections = [
        Section("Correlation of logits", text, plot_correlations(correlations, data.class_names)),
        Section(
            "Calibration",
            "Dots above the diagonal are more accurate than confident. A dot's area is its share of the samples.",
            plot_reliability(logits),
            errors,
        ),
    ]
    if len(students) > 1:
        accuracy = {name: class_accuracy(*logits[name]).numpy() for name in students}
        reference = students[0]
        changes = {name: accuracy[name] - accuracy[reference] for name in students[1:]}
        sections.append(
            Section(
                "Change per class",
                "Accuracy on the validation samples of every class, beside the first run's.",
                plot_class_changes(changes, data.class_names, reference),
            )
        )
    return sections


def _landscapes(
    networks: Mapping[str, Classifier], data: ImageDataModule, *, resolution: int, extent: float, samples: int
) -> Section:
    batches, count = [], 0
    for views, target in data.val_dataloader():
        batches.append((views["clean"], target))
        count += len(target)
        if count >= samples:
            break
    images, target = (torch.cat(parts)[:samples] for parts in zip(*batches, strict=True))
    offsets = torch.linspace(-extent, extent, resolution)
    surfaces = {}
    for name, network in tqdm(networks.items(), desc="loss landscapes", unit="student"):
        generator = torch.Generator().manual_seed(0)  # students of one architecture move the same way
        directions = [filter_direction(dict(network.named_parameters()), generator) for _ in range(2)]
        surfaces[name] = loss_surface(network, directions, offsets, images, target).numpy()
    return Section(
        "Loss landscapes",
        f"Cross-entropy on {len(target)} validation images around every student (the cross), along the same two random "
        "directions, scaled filter by filter to the student's own weights: 1 moves every filter by its own length. All "
        "panels share one scale.",
        plot_landscapes(surfaces, offsets.numpy()),
    )


def sections(runs: Sequence[Run], *, resolution: int = 13, extent: float = 0.6, samples: int = 500) -> list[Section]:
    """Compare students.

    Args:
        runs: Their runs, the reference first.
        resolution: Points per direction of the loss landscapes; 0 leaves them out.
        extent: How far they reach, in lengths of the filters.
        samples: Validation images they are computed on.

    Raises:
        UserError: If classifiers and detectors, or runs on different data, are to be compared.
    """
    kinds: dict[tuple[Any, ...], str] = {
        (type(run.cli.model).__name__, tuple(run.cli.datamodule.class_names)): run.name for run in runs
    }
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(kinds.values())} have other tasks or classes; report on them one by one")
    found = log_sections(runs)
    if runs[0].classifies:
        found += student_sections(runs, resolution=resolution, extent=extent, samples=samples)
    return found


def main(args: list[str] | None = None) -> Path:
    """Write the report that a command line asks for."""
    return report_command(Run, sections, package="vision_kd", description=__doc__, args=args)


if __name__ == "__main__":
    run_command(main)
