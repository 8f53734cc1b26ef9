"""Obtain the teacher: from a file, from its library, from the cache, or by training it once."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from kd_common.files import cache_root, locked
from kd_common.schedules import CosineDecay
from vision_kd.data.base import ImageDataModule
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import CheckpointError, NormalizedNetwork, save_student
from vision_kd.module import DistillationModule
from vision_kd.policies import SGD
from vision_kd.specs import TeacherSpec
from vision_kd.training import ComponentTraining

CACHE_FORMAT = 1


def teacher_cache_path(spec: TeacherSpec, data: Mapping[str, Any], ranks: int = 1) -> Path:
    """File of a trained teacher; its name is a hash of everything that determines the weights.

    Args:
        spec: The teacher.
        data: Resolved configuration of the DataModule, ``class_path`` and ``init_args`` in plain types.
        ranks: Processes of the run; the teacher is trained on one, with the batch of them all.
    """
    # The teacher is trained with its own seed, so the student's must not lead to another teacher.
    ignored = ("seed", "download", "num_workers")
    settings = {
        key: value for key, value in data["init_args"].items() if key not in ignored and not key.startswith("val_")
    }
    if "batch_size" in settings:
        settings["batch_size"] *= ranks
    recipe = {"teacher": asdict(spec), "data": {**data, "init_args": settings}, "format": CACHE_FORMAT}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_root() / "teachers" / f"{spec.name.replace('/', '_')}-{digest}.pt"


def obtain_teacher(
    spec: TeacherSpec,
    datamodule: ImageDataModule,
    data: Mapping[str, Any],
    *,
    task: type[ComponentTraining] = DistillationModule,
    ranks: int = 1,
    launched: bool = False,
    accelerator: str = "auto",
    progress_bar: bool = True,
) -> tuple[NormalizedNetwork, str]:
    """The teacher and where it came from.

    Args:
        spec: The teacher.
        datamodule: Data it is trained on when no weights are found.
        data: Resolved configuration of that DataModule, plain types; part of the cache key.
        task: How such networks are built, loaded and trained.
        ranks: Processes of the run, whose joint batch the teacher is trained with.
        launched: Whether a launcher, not Lightning, started these processes, so that they all come here.
        accelerator: Lightning's name of the hardware it is trained on.
        progress_bar: Show one while training.

    Returns:
        The network, and one line that says how it was obtained.

    Raises:
        FileNotFoundError, ValueError: From loading a checkpoint that is missing, damaged or of another model.
        RuntimeError: If it has to be trained inside a run that a launcher started on several processes.
    """
    if spec.checkpoint is not None or spec.pretrained:
        teacher = task.build(spec.model, **task.facts(datamodule))
        return teacher, f"loaded from {spec.checkpoint or spec.name.split('/')[0]}"

    path = teacher_cache_path(spec, data, ranks)
    with locked(path, f"the teacher {spec.name}"):
        if path.is_file():
            try:
                return task.load(path), f"from the cache, {path}"
            except CheckpointError as error:
                raise CheckpointError(f"cached teacher: {error}\nDelete {path} to train it again.") from error
        if launched:
            raise RuntimeError(
                f"no weights for the teacher {spec.name}, and training it inside a multi-process launch would train "
                f"it once per process. Train and cache it first, without the launcher, with --trainer.devices 1 "
                f"--data.batch_size {datamodule.batch_size * ranks}, or set model.teacher.checkpoint"
            )
        teacher = train_teacher(spec, datamodule, task, ranks, accelerator, progress_bar)
        save_student(path, teacher, spec.model, extra={"recipe": json.loads(json.dumps(asdict(spec), default=str))})
    return teacher, f"trained for {spec.epochs} epochs, cached as {path}"


def train_teacher(
    spec: TeacherSpec,
    datamodule: ImageDataModule,
    task: type[ComponentTraining] = DistillationModule,
    ranks: int = 1,
    accelerator: str = "auto",
    progress_bar: bool = True,
) -> NormalizedNetwork:
    """Train a teacher on the labels alone, with SGD and a cosine schedule, on one device with all ranks' batch."""
    rank_zero_info(f"No weights for the teacher {spec.name}: training it for {spec.epochs} epochs, once.")
    torch.manual_seed(spec.seed)
    data = copy.deepcopy(datamodule)
    data.batch_size *= ranks
    data.seed, data.views = spec.seed, Vanilla.views
    module = task(
        spec.model,
        **task.facts(data),
        method=Vanilla(),
        policy=SGD(),
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        lr_schedule=CosineDecay(warmup_epochs=spec.warmup_epochs),
        clip_norm=spec.clip_norm,
        seed=spec.seed,
    )
    trainer = pl.Trainer(
        max_epochs=spec.epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=spec.epochs,
    )
    trainer.fit(module, datamodule=data)
    return module.student.cpu()
