"""What the training system has to be told about a task: classifying images, detecting objects."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from kd_common.run.training import TrainingModule
from vision_kd.data import ImageDataModule
from vision_kd.methods import Method
from vision_kd.models import ModelSpec, NormalizedNetwork
from vision_kd.training.step import StepOutput


class Task(TrainingModule):
    """How networks of a task are built, how a batch becomes component gradients, and how a network is measured.

    Attributes:
        metrics: Validation metrics by name, each with its column header; epochs are compared by the first.
        data_spec_names: Attributes of the DataModule that the constructor takes.
        distillation_settings: Settings that a student without a teacher has at null.
        method: Loss.
    """

    metrics: ClassVar[dict[str, str]]
    data_spec_names: ClassVar[tuple[str, ...]]
    distillation_settings: ClassVar[tuple[str, ...]] = ("topk",)
    export_name = "student_{}.pt"
    method: Method

    @staticmethod
    @abstractmethod
    def build(spec: ModelSpec, **data_spec: Any) -> NormalizedNetwork:
        """Build the network of a specification for data with this data spec."""

    @staticmethod
    @abstractmethod
    def load(path: Path) -> NormalizedNetwork:
        """The network in a file that `save_student` wrote.

        Raises:
            CheckpointError: If it is no such file.
        """

    @staticmethod
    @abstractmethod
    def measure(network: NormalizedNetwork, data: ImageDataModule, device: torch.device | str) -> dict[str, float]:
        """The metrics of a network on all validation data, in this process alone."""

    @abstractmethod
    def check_teacher(self, teacher: NormalizedNetwork) -> None:
        """Refuse a teacher that does not fit the student.

        Raises:
            ValueError: If it does not.
        """

    @abstractmethod
    def component_step(
        self, batch: Any, params: Sequence[nn.Parameter], *, epoch: float, k: int | None, **settings: Any
    ) -> StepOutput:
        """Losses and component gradients of one micro-batch; see :mod:`vision_kd.training.step`."""

    @abstractmethod
    def validation_metrics(self) -> dict[str, float]:
        """The metrics of the epoch over all ranks, of which the next epoch starts anew."""

    def save_visualizations(self, folder: Path) -> None:
        """Save pictures of the student's work in its last validated epoch into a folder; a task may have none."""

    def data_settings(self) -> dict[str, Any]:
        """Settings of the data, for ``vision_kd.evaluate``."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        return {"data": data.settings} if isinstance(data, ImageDataModule) else {}

    @property
    def metric(self) -> str:
        """Name of the metric by which epochs are compared."""
        return next(iter(self.metrics))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components of the loss."""
        return self.method.components

    @property
    def needs_teacher(self) -> bool:
        """Whether any component reads the teacher."""
        return self.components != ("task",)

    @classmethod
    def data_spec(cls, data: ImageDataModule) -> dict[str, Any]:
        """Return the data spec: what the networks have to know of the data."""
        return {name: getattr(data, name) for name in cls.data_spec_names}
