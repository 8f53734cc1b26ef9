"""One dry step of a run, before its teacher is trained."""

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kd_common.run.rehearsal import check_monitors, dry_fit, rehearsing
from kd_common.run.trainer_settings import check_batches, limited
from vision_kd.data import ImageDataModule
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import ModelSpec, save_student
from vision_kd.policies import SGD
from vision_kd.training.component_training import ComponentTraining

STILL = 1e-12
"""Learning rate of the dry step: two images say nothing about the run's own, under which they may diverge."""


def rehearse(model: ComponentTraining, data: ImageDataModule, trainer: pl.Trainer, run_dir: Path | None) -> None:
    """Train and validate copies of student and teacher for one step on two images, and write and read the student.

    The teacher has random weights. What fails here would fail later, after the teacher was trained or even at the
    first export. The run itself is left as it was, bit for bit.

    Args:
        model: The training module.
        data: The data, which are prepared.
        trainer: The trainer of the run.
        run_dir: Folder of the run; None for one that writes nothing.

    Raises:
        ValueError: From the settings, such as a limit that leaves no batch.
    """
    accelerator, task = trainer.strategy.root_device.type, type(model)
    data.views = model.method.views
    train, val = (len(loader()) for loader in (data.train_dataloader, data.val_dataloader))
    check_batches(trainer, train // trainer.world_size, -(-val // trainer.world_size))
    with rehearsing(run_dir) as folder:
        twin = copy.deepcopy(model)
        twin.learning_rate = STILL
        if model.teacher_spec is not None and model.needs_teacher:
            spec = ModelSpec(model.teacher_spec.name, model.teacher_spec.args)
            teacher = model.teacher or task.build(spec, **task.data_spec(data))
            twin.attach_teacher(copy.deepcopy(teacher))
            learner = task(spec, **task.data_spec(data), method=Vanilla(), policy=SGD(), learning_rate=STILL)
            dry_fit(pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False), learner, data, accelerator)
        logged = dry_fit(trainer, twin, data, accelerator)
        check_monitors(trainer, logged, later=("gsnr",))
        save_student(folder / "student.pt", twin.inference_model, model.student_spec, {"data": data.settings})
        task.load(folder / "student.pt")


def limited_validation(data: ImageDataModule, trainer: pl.Trainer) -> ImageDataModule:
    """Return the data with as many validation images as all processes of the student's validation see together."""
    loader = data.val_dataloader()
    each = limited(-(-len(loader) // trainer.world_size), trainer.limit_val_batches)
    view: Any = copy.copy(data)
    view.val_dataloader = lambda: itertools.islice(loader, each * trainer.world_size)
    return view
