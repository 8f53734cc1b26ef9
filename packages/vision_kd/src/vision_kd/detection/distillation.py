"""Training of detectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd_common.errors import UserError
from vision_kd.data import ImageDataModule
from vision_kd.detection.data import COCO
from vision_kd.detection.detector import Detector
from vision_kd.detection.draw import draw_detections
from vision_kd.detection.evaluation import DetectionRecord, average_precision, evaluate_detector, write_results
from vision_kd.detection.review import ReviewFusion
from vision_kd.detection.step import FEATURE, detection_step
from vision_kd.detection.zoo import FPN_CHANNELS, FPN_LEVELS, build_detector, load_detector
from vision_kd.models import ModelSpec, NormalizedNetwork
from vision_kd.training.component_training import ComponentTraining
from vision_kd.training.specs import TeacherSpec
from vision_kd.training.step import StepOutput

DRAWN = 4
Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass(frozen=True)
class FeatureDistillation:
    """Distillation of the FPN maps with ReviewKD, as a component `feature` that moves with `nontarget`.

    Attributes:
        weight: Weight of the component; published: 1.2 for ResNet-18, 1.0 for ResNet-50 and 2.0 for MobileNetV2.
        channels: Channels inside the fusion.
    """

    weight: float = 1.0
    channels: int = 256


class DetectionModule(ComponentTraining):
    """LightningModule that distils a detector; batches come from `vision_kd.detection.COCO`.

    Args:
        student: Network to train.
        class_names: Names of the categories; linked from the data.
        mean: Per-channel mean of the images in [0, 1], the student's normalisation; linked from the data.
        std: Per-channel standard deviation; linked from the data.
        features: Distillation of the FPN maps besides the method's; None for none.
        settings: The rest, as in `vision_kd.training.component_training.ComponentTraining`.

    Raises:
        UserError: If a setting is out of range, or the method needs several views; the message names it.
    """

    metrics: ClassVar[dict[str, str]] = {name: name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    data_spec_names = ("class_names", "mean", "std")
    distillation_settings = ("topk", "features")
    student: Detector

    def __init__(
        self,
        student: ModelSpec,
        class_names: tuple[str, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        features: FeatureDistillation | None = None,
        **settings: Any,
    ) -> None:
        self.features = features  # set first, because the components depend on it
        super().__init__(student, {"class_names": class_names, "mean": mean, "std": std}, **settings)
        if self.student.class_names != tuple(class_names):
            raise UserError(
                f"the weights of model.student know {len(self.student.class_names)} categories, "
                f"{', '.join(self.student.class_names[:3])}, ..., and the data have {len(class_names)}, "
                f"{', '.join(class_names[:3])}, ...: labels would mean other categories. Take weights trained on these "
                "categories, or backbone_weights alone"
            )
        if self.method.views != ("weak",):
            raise UserError(
                f"model.method {type(self.method).__name__} compares several views of an image, a detector has one: "
                "choose a method with one view, such as KD or DKD"
            )
        if features is not None:
            if not (features.weight > 0 and features.channels >= 1):
                raise UserError(f"model.features needs a weight > 0 and channels >= 1, got {features}")
            assert self.teacher_spec is not None  # required by a component
            widths = _fpn_channels(student), _fpn_channels(self.teacher_spec)
            self.auxiliary.append(ReviewFusion(len(FPN_LEVELS) + 1, *widths, features.channels))
        self._class_indices: list[int] = []
        self._record: DetectionRecord | None = None
        self._detected: tuple[Tensor, list[int]] | None = None

    def setup(self, stage: str) -> None:
        """Raise for a precision that is too coarse for box coordinates.

        Raises:
            UserError: For trainer.precision bf16-true.
        """
        super().setup(stage)
        if self.trainer.precision == "bf16-true":
            raise UserError("trainer.precision bf16-true rounds box coordinates to steps of 8 pixels; use bf16-mixed")

    @staticmethod
    def build(spec: ModelSpec, **data_spec: Any) -> Detector:
        """Build a detector with `vision_kd.detection.build_detector`."""
        return build_detector(spec, **data_spec)

    @staticmethod
    def load(path: Path) -> Detector:
        """Load a detector with `vision_kd.detection.load_detector`."""
        return load_detector(path)

    @staticmethod
    def measure(network: NormalizedNetwork, data: ImageDataModule, device: torch.device | str) -> dict[str, float]:
        """Return COCO's average precisions; see `vision_kd.detection.evaluate_detector`."""
        assert isinstance(network, Detector)
        assert isinstance(data, COCO)
        record = evaluate_detector(network, data, device)
        return average_precision(record.split, *record.gather(device))

    @property
    def components(self) -> tuple[str, ...]:
        """Components of the method, and the features' component."""
        return (*self.method.components, FEATURE) if self.features is not None else self.method.components

    def check_teacher(self, teacher: NormalizedNetwork) -> None:
        """Check that the teacher knows the student's categories and has the announced number of feature channels."""
        if not isinstance(teacher, Detector):
            raise UserError(f"the teacher of a detector must be one, got a {type(teacher).__name__}")
        self._class_indices = teacher.class_indices(self.student.class_names)
        assert self.teacher_spec is not None
        channels = teacher.network.backbone.out_channels
        if self.features is not None and channels != _fpn_channels(self.teacher_spec):
            raise UserError(
                f"the teacher's FPN has {channels} channels, model.teacher.args says "
                f"{_fpn_channels(self.teacher_spec)}: set fpn_channels there"
            )

    def component_step(
        self, batch: Batch, params: Sequence[nn.Parameter], *, epoch: float, k: int | None, **settings: Any
    ) -> StepOutput:
        """Compute the gradients with `vision_kd.detection.step.detection_step`."""
        images, targets = batch
        teacher: Any = self.teacher
        fusion: Any = self.auxiliary[0] if self.auxiliary else None
        return detection_step(
            self.student,
            teacher,
            self.method,
            [self._floating(image) for image in images],
            targets,
            params,
            class_indices=self._class_indices,
            fusion=fusion,
            feature_weight=self.features.weight if self.features else 0.0,
            epoch=epoch,
            k=k,
            **settings,
        )

    def _floating(self, image: Tensor) -> Tensor:
        """Return a uint8 image in [0, 1], in the precision of the weights."""
        return image.to(next(self.student.parameters()).dtype) / 255

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Record the detections of one batch."""
        images, targets = batch
        if self._record is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
            self._record = DetectionRecord(data.split("val"), self.student.class_names)
        self._record.update(self([self._floating(image) for image in images]), targets)

    def validation_metrics(self) -> dict[str, float]:
        """Return COCO's average precisions over all ranks.

        Raises:
            NonFiniteLossError: If a parameter is not finite, which no score would show.
        """
        if not all(parameter.isfinite().all() for parameter in self.inference_model.parameters()):
            raise self.non_finite(f"a parameter is NaN or infinite at epoch {self.current_epoch}")
        assert self._record is not None
        record, self._record = self._record, None
        self._detected = record.gather(self.device)
        self._split = record.split
        return average_precision(record.split, *self._detected)

    def save_visualizations(self, folder: Path) -> None:
        """Write `detections.json`, COCO results, and `detections.png`, some detections next to the ground truth."""
        if self._detected is None:  # a finished run that was resumed validates nothing
            return
        rows, image_ids = self._detected
        write_results(folder / "detections.json", rows)
        draw_detections(folder / "detections.png", self._split, rows, image_ids[:DRAWN])


def _fpn_channels(spec: ModelSpec | TeacherSpec) -> int:
    return spec.args.get("fpn_channels", FPN_CHANNELS)
