"""Obtain the teacher: from a file, from its library, from the cache, or by training it once."""

import contextlib
import copy
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_common.files import cache_root, locked
from kd_common.run.checkpoints import AtomicCheckpointIO, check_resumable
from kd_common.run.errors import NonFiniteLossError
from kd_common.schedules import CosineDecay
from vision_kd.data.base import ImageDataModule
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import MODELS, CheckpointError, NormalizedNetwork, save_student
from vision_kd.policies import SGD
from vision_kd.training.specs import TeacherSpec

CACHE_FORMAT = 2

WITHOUT_EFFECT = ("seed", "download", "num_workers", "root", "train_annotations", "train_images")
"""Settings of data that do not change the teacher: its seed is its own, and the content of the data counts."""


def teacher_cache_path(
    spec: TeacherSpec,
    datamodule: ImageDataModule,
    data: Mapping[str, Any],
    *,
    task: type[Any],
    ranks: int = 1,
) -> Path:
    """File of a trained teacher; its name is a hash of everything that determines the weights.

    That is the teacher's settings, the content of the training data, what the network is told of them (classes in their
    order, channels, size, mean and standard deviation), the settings that change a batch, and the code of network and
    data.

    Args:
        spec: The teacher.
        datamodule: Data it is trained on; they are fetched and set up.
        data: Resolved configuration of the DataModule, `class_path` and `init_args` in plain types.
        task: How such networks are trained.
        ranks: Processes of the run; the teacher is trained on one, with the batch of them all.
    """
    settings = {
        key: value
        for key, value in data["init_args"].items()
        if key not in WITHOUT_EFFECT and not key.startswith("val_")
    }
    if "batch_size" in settings:
        settings["batch_size"] *= ranks
    datamodule.prepare_data()
    datamodule.setup("fit")
    recipe = {
        "teacher": asdict(spec),
        "network": network_code(spec.name),
        "data": {**data, "init_args": settings},
        "code of data": code_version(type(datamodule)),
        "content": datamodule.training_digest(),
        "data_spec": task.data_spec(datamodule),
        "format": CACHE_FORMAT,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_root() / "teachers" / f"{spec.name.replace('/', '_')}-{digest}.pt"


def network_code(name: str) -> str:
    """Return the version of the code that a network is built by."""
    library = name.rpartition("/")[0]
    if library or name not in MODELS.names():  # detectors are built of torchvision's parts
        library = library or "torchvision"
        return f"{library} {importlib.metadata.version(library)}"
    return code_version(MODELS.get(name))


def code_version(thing: Any) -> str:
    """Return the version of the package that a class or function comes from; of a loose file, a hash of its text."""
    package = thing.__module__.partition(".")[0]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        with contextlib.suppress(OSError, TypeError):  # typed into an interpreter, which keeps no text
            return hashlib.sha256(inspect.getsource(inspect.getmodule(thing) or thing).encode()).hexdigest()
    return thing.__qualname__


def obtain_teacher(
    spec: TeacherSpec,
    datamodule: ImageDataModule,
    data: Mapping[str, Any],
    *,
    task: type[Any],
    ranks: int = 1,
    launched: bool = False,
    accelerator: str = "auto",
    progress_bar: bool = True,
    dry: bool = False,
) -> tuple[NormalizedNetwork, str]:
    """Return the teacher, and one line about where it came from.

    Args:
        spec: The teacher.
        datamodule: Data it is trained on when no weights are found.
        data: Resolved configuration of that DataModule, plain types; part of the cache key.
        task: How such networks are built, loaded and trained.
        ranks: Processes of the run, whose joint batch the teacher is trained with.
        launched: Whether a launcher, not Lightning, started these processes, so that they all come here.
        accelerator: Lightning's name of the hardware it is trained on.
        progress_bar: Show one while training.
        dry: Take random weights where there are none, as a run that only tries a few batches does.

    Returns:
        The network, and one line that says how it was obtained.

    Raises:
        UserError: From loading a checkpoint that is missing, damaged or of another model.
        RuntimeError: If it has to be trained inside a run that a launcher started on several processes.
    """
    if spec.checkpoint is not None or spec.pretrained:
        teacher = task.build(spec.model, **task.data_spec(datamodule))
        return teacher, f"loaded from {spec.checkpoint or spec.name.split('/')[0]}"

    path = teacher_cache_path(spec, datamodule, data, task=task, ranks=ranks)
    if dry and not path.is_file():
        torch.manual_seed(spec.seed)
        return task.build(spec.model, **task.data_spec(datamodule)), "random: trainer.fast_dev_run trains no teacher"
    if not path.is_file():
        with locked(path, f"the teacher {spec.name}"):
            if not path.is_file():  # another process may have trained it meanwhile
                if launched:
                    raise RuntimeError(
                        f"no weights for the teacher {spec.name}, and training it inside a multi-process launch would "
                        "train it once per process. Train and cache it first, without the launcher, with "
                        f"--trainer.devices 1 --data.batch_size {datamodule.batch_size * ranks}, or set "
                        "model.teacher.checkpoint"
                    )
                progress = path.with_suffix(".ckpt")
                teacher = train_teacher(spec, datamodule, task, ranks, accelerator, progress_bar, progress)
                recipe = json.loads(json.dumps(asdict(spec), default=str))
                save_student(path, teacher, spec.model, extra={"recipe": recipe})
                progress.unlink(missing_ok=True)
                return teacher, f"trained for {spec.epochs} epochs, cached as {path}"
    try:
        return task.load(path), f"from the cache, {path}"
    except CheckpointError as error:
        raise CheckpointError(f"cached teacher: {error}\nDelete {path} to train it again.") from error


def train_teacher(
    spec: TeacherSpec,
    datamodule: ImageDataModule,
    task: type[Any],
    ranks: int = 1,
    accelerator: str = "auto",
    progress_bar: bool = True,
    progress: Path | None = None,
) -> NormalizedNetwork:
    """Train a teacher on the labels alone, with SGD and a cosine schedule, on one device with all ranks' batch.

    Args:
        spec: The teacher.
        datamodule: Data it is trained on.
        task: How such networks are built and trained.
        ranks: Processes of the run, whose joint batch it is trained with.
        accelerator: Lightning's name of the hardware.
        progress_bar: Whether to show one.
        progress: Checkpoint that is written after every epoch, and continued from if a killed run left it.
    """
    resumed = progress is not None and _resumable(progress)
    rank_zero_info(
        f"No weights for the teacher {spec.name}: training it for {spec.epochs} epochs, once"
        + (f", from {progress} on." if resumed else ".")
    )
    torch.manual_seed(spec.seed)
    alone: Any = copy.copy(datamodule)
    alone.trainer = None  # the teacher's trainer is another one
    data = copy.deepcopy(alone)
    data.batch_size *= ranks
    data.seed, data.views = spec.seed, Vanilla.views
    module = task(
        spec.model,
        **task.data_spec(data),
        method=Vanilla(),
        policy=SGD(),
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        lr_schedule=CosineDecay(warmup_epochs=spec.warmup_epochs),
        clip_norm=spec.clip_norm,
        seed=spec.seed,
    )
    module.hparams.clear()  # objects, which a checkpoint that is read without running code cannot hold
    trainer = pl.Trainer(
        max_epochs=spec.epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        callbacks=[Progress(progress)] if progress else None,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=spec.epochs,
        plugins=[AtomicCheckpointIO()],
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=progress if resumed else None, weights_only=True)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(
            f"training of the teacher {spec.name} failed ({error}) Its own settings are those of model.teacher: lower "
            "model.teacher.learning_rate or set model.teacher.clip_norm."
        ) from error
    if trainer.current_epoch < spec.epochs:
        raise RuntimeError(
            f"training of the teacher {spec.name} was stopped in epoch {trainer.current_epoch + 1} of {spec.epochs}; "
            "start again to go on from there"
        )
    return module.student.cpu()


class Progress(pl.Callback):
    """Write a checkpoint after every epoch, over the one before.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        trainer.save_checkpoint(self.path, weights_only=False)  # all of it; said, or Lightning says so

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what is kept when the training is interrupted."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            kept = f"the same command goes on from {self.path}" if self.path.is_file() else "nothing is kept yet"
            rank_zero_info(f"Interrupted in epoch {trainer.current_epoch} of the teacher's training; {kept}.")


def _resumable(path: Path) -> bool:
    """Return whether there is a checkpoint to go on from; name a damaged one, after which training starts anew."""
    if not path.is_file():
        return False
    try:
        check_resumable(path)
    except ValueError as error:
        rank_zero_warn(f"the teacher's training cannot go on and starts anew: {error}")
        return False
    return True


def launched_from_outside(trainer: pl.Trainer) -> bool:
    """Return whether torchrun, SLURM or the like started the processes of a run of several."""
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.cluster_environment is None:
        return False
    return trainer.world_size > 1 and strategy.cluster_environment.creates_processes_externally
