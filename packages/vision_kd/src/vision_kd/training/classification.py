"""Training of classifiers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from kd_common.errors import UserError
from kd_common.functional.logits import at_least_fp32
from vision_kd.data import ImageDataModule
from vision_kd.methods.base import cross_entropy
from vision_kd.models import Classifier, ModelSpec, NormalizedNetwork, build_classifier, load_classifier
from vision_kd.models.classifier import DATA_SPEC
from vision_kd.training.component_training import ComponentTraining
from vision_kd.training.metrics import accuracy
from vision_kd.training.step import StepOutput, distillation_step


class DistillationModule(ComponentTraining):
    """Distil a classifier; batches are `(views, target)`.

    Args:
        student: Network to train.
        num_classes: Number of classes C; linked from the data.
        in_channels: Image channels; linked from the data.
        mean: Per-channel mean of the images in [0, 1], the student's normalisation; linked from the data.
        std: Per-channel standard deviation; linked from the data.
        class_names: Names of the classes, in the order of the labels; linked from the data.
        image_size: Side of an image in pixels; linked from the data.
        settings: The rest, as in `vision_kd.training.component_training.ComponentTraining`.

    Raises:
        UserError: If a setting is out of range; the message names it.
    """

    metrics: ClassVar[dict[str, str]] = {"top1": "top-1", "top5": "top-5"}
    data_spec_names = (*DATA_SPEC, "mean", "std")

    def __init__(
        self,
        student: ModelSpec,
        num_classes: int,
        in_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_names: tuple[str, ...] = (),
        image_size: int | None = None,
        **settings: Any,
    ) -> None:
        data_spec = {"num_classes": num_classes, "in_channels": in_channels, "mean": mean, "std": std}
        data_spec |= {"class_names": class_names, "image_size": image_size}
        super().__init__(student, data_spec, **settings)
        self.top1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")
        self.val_loss = MeanMetric(nan_strategy="disable")  # the default drops NaN

    @staticmethod
    def build(spec: ModelSpec, **data_spec: Any) -> Classifier:
        """Build a classifier with `vision_kd.models.build_classifier`."""
        return build_classifier(spec, **data_spec)

    @staticmethod
    def load(path: Path) -> Classifier:
        """Load a classifier with `vision_kd.models.load_classifier`."""
        return load_classifier(path)

    @staticmethod
    def measure(network: NormalizedNetwork, data: ImageDataModule, device: torch.device | str) -> dict[str, float]:
        """Return top-1 and top-5 accuracy; see `vision_kd.training.metrics.accuracy`."""
        return accuracy(network, data.val_dataloader(), data.num_classes, device)

    def check_teacher(self, teacher: NormalizedNetwork) -> None:
        """Refuse a teacher with other classes, another order of them, or other images than the student's."""
        if not isinstance(teacher, Classifier):
            raise UserError(f"the teacher of a classifier must be one, got a {type(teacher).__name__}")
        own: Any = self.student
        teacher.check_data("the teacher", **{name: getattr(own, name) for name in DATA_SPEC})

    def component_step(
        self,
        batch: tuple[Mapping[str, Tensor], Tensor],
        params: Sequence[nn.Parameter],
        *,
        epoch: float,
        k: int | None,
        **settings: Any,
    ) -> StepOutput:
        """Call `vision_kd.training.step.distillation_step` with the two views and labels of the batch."""
        views, target = batch
        return distillation_step(
            self.student, self.teacher, self.method, views, target, params, epoch=epoch, k=k, **settings
        )

    def validation_step(self, batch: tuple[Mapping[str, Tensor], Tensor], batch_idx: int) -> None:
        """Count top-1 and top-5 hits and the cross-entropy of one batch."""
        views, target = batch
        logits = at_least_fp32(self(views["clean"]))
        self.top1.update(logits, target)
        self.top5.update(logits, target)
        self.val_loss.update(cross_entropy(logits, target))

    def validation_metrics(self) -> dict[str, float]:
        """Return top-1, top-5 and the cross-entropy of all ranks.

        Raises:
            NonFiniteLossError: If the cross-entropy is not finite.
        """
        values = {}
        for name, metric in {"top1": self.top1, "top5": self.top5, "loss": self.val_loss}.items():
            values[name] = float(metric.compute())  # gathers all ranks
            metric.reset()
        if not math.isfinite(values["loss"]):
            raise self.non_finite(f"the validation loss is {values['loss']} at epoch {self.current_epoch}")
        return values
