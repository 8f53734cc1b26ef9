"""What the training system has to be told about a task: classifying images, detecting objects."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import nn

from kd_common.distributed import world_size
from kd_common.run.training import TrainingModule
from vision_kd.data import ImageDataModule
from vision_kd.methods import Method
from vision_kd.models import ModelSpec, NormalizedNetwork
from vision_kd.training.specs import TeacherSpec
from vision_kd.training.step import StepOutput
from vision_kd.training.teacher import launched_from_outside, obtain_teacher


class Task(TrainingModule):
    """How networks of a task are built, how a batch becomes component gradients, and how a network is measured.

    Attributes:
        metrics: Validation metrics by name, each with its column header; epochs are compared by the first.
        data_spec_names: Attributes of the DataModule that the constructor takes.
        distillation_settings: Settings that a student without a teacher has at null.
        method: Loss.
        teacher_spec: Network to distil from and how to obtain it.
        teacher_origin: Where the teacher came from, in one line.
    """

    metrics: ClassVar[dict[str, str]]
    data_spec_names: ClassVar[tuple[str, ...]]
    distillation_settings: ClassVar[tuple[str, ...]] = ("topk",)
    export_name = "student_{}.pt"
    method: Method
    teacher_spec: TeacherSpec | None

    def __init__(self) -> None:
        super().__init__()
        # Not a submodule: the teacher stays out of the checkpoint, the optimizer, DDP and `.train()`.
        self._teacher: list[NormalizedNetwork] = []
        self.teacher_origin = ""

    @staticmethod
    @abstractmethod
    def build(spec: ModelSpec, **data_spec: Any) -> NormalizedNetwork:
        """Build the network of a specification for data with this data spec."""

    @staticmethod
    @abstractmethod
    def load(path: Path) -> NormalizedNetwork:
        """Load the network from a file that `save_student` wrote.

        Raises:
            CheckpointError: If it is no such file.
        """

    @staticmethod
    @abstractmethod
    def measure(network: NormalizedNetwork, data: ImageDataModule, device: torch.device | str) -> dict[str, float]:
        """Return the metrics of a network on all validation data, in this process alone."""

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
        """Losses and component gradients of one micro-batch; see `vision_kd.training.step`."""

    @abstractmethod
    def validation_metrics(self) -> dict[str, float]:
        """Return the metrics of the epoch over all ranks, of which the next epoch starts anew."""

    def save_visualizations(self, folder: Path) -> None:
        """Save pictures of the student's work in its last validated epoch into a folder; a task may have none."""

    def data_settings(self) -> dict[str, Any]:
        """Return the settings of the data, for `vision_kd.evaluate`."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        return {"data": data.settings} if isinstance(data, ImageDataModule) else {}

    @property
    def metric(self) -> str:
        """Name of the metric by which epochs are compared."""
        return next(iter(self.metrics))

    @property
    def components(self) -> tuple[str, ...]:
        """Return the names of the components of the loss."""
        return self.method.components

    @property
    def needs_teacher(self) -> bool:
        """Return whether any component reads the teacher."""
        return self.components != ("task",)

    @classmethod
    def data_spec(cls, data: ImageDataModule) -> dict[str, Any]:
        """Return the data spec: what the networks have to know of the data."""
        return {name: getattr(data, name) for name in cls.data_spec_names}

    def attach_teacher(self, teacher: NormalizedNetwork) -> None:
        """Distil from this network; it is frozen and kept in evaluation mode.

        Raises:
            UserError: If its classes do not fit the student's.
        """
        self.check_teacher(teacher)
        self._teacher = [teacher.eval().requires_grad_(False)]

    @property
    def teacher(self) -> NormalizedNetwork | None:
        """Return the attached teacher, or None."""
        return self._teacher[0] if self._teacher else None

    def obtain(self, data: ImageDataModule, trainer: pl.Trainer) -> None:
        """Tell the data which views the method reads, and obtain the teacher, once.

        `setup` calls this. `vision_kd.fit` calls it before, because several processes cannot train a teacher once they
        have joined.

        Args:
            data: Data of the run, on which a teacher without weights is trained.
            trainer: Trainer of the run.

        Raises:
            UserError: If the teacher's weights are missing, damaged or of another model.
        """
        data.views = self.method.views
        if not self.needs_teacher or self.teacher is not None:
            return
        assert self.teacher_spec is not None
        teacher, self.teacher_origin = obtain_teacher(
            self.teacher_spec,
            data,
            data.settings,
            task=type(self),
            ranks=trainer.world_size,
            launched=launched_from_outside(trainer) or world_size() > 1,
            accelerator=trainer.strategy.root_device.type,
            progress_bar=trainer.progress_bar_callback is not None,
            dry=bool(trainer.fast_dev_run),  # type: ignore[attr-defined]  # set by a connector
        )
        self.attach_teacher(teacher)
