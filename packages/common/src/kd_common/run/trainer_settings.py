"""Settings of Lightning's trainer that a run cannot respect, refused before it starts."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from kd_common.errors import UserError

_CALLBACKS: Mapping[type[pl.Callback], str] = {
    callbacks.GradientAccumulationScheduler: "changes the length of an epoch in updates, over which schedules run",
    callbacks.StochasticWeightAveraging: "averages weights after the last student was saved",
    callbacks.WeightAveraging: "validates averaged weights, and others would be saved as the student",
    callbacks.BatchSizeFinder: "changes data.batch_size, and a resumed run would train with another; set it",
    callbacks.LearningRateFinder: "changes model.learning_rate, and a resumed run would train with another; set it",
    callbacks.ModelPruning: "gives the weights other names, under which no saved student is loaded",
    callbacks.OnExceptionCheckpoint: "lets a new run go on, unasked, from any last.ckpt that it finds (ModelCheckpoint "
    "with save_on_exception writes such a file, too)",
    callbacks.BaseFinetuning: "trains other parameters than the optimizer was built for",
}


def check_precision_and_length(precision: Any, max_epochs: int | None, max_steps: int) -> None:
    """Refuse fp16 and a run of unknown length, before models are loaded for it.

    Raises:
        UserError: Naming the setting.
    """
    if str(precision).startswith("16"):
        raise UserError(
            f"trainer.precision {precision}: gradients are neither scaled nor summed in a way that fp16 bears; use "
            "bf16-mixed or 32-true"
        )
    if 0 in (max_epochs, max_steps) or max(max_epochs or -1, max_steps) < 1:
        raise UserError("set trainer.max_epochs or trainer.max_steps to 1 or more: the schedules run over them")


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse settings under which something else would be trained, validated or kept than the run reports.

    Args:
        trainer: The trainer of the run.
        module: What it is to train.

    Raises:
        UserError: Naming the setting.
    """
    if trainer.barebones:
        raise UserError("trainer.barebones logs no metrics, from which the result is made; leave it out")
    for split, use in (("train", "learn from"), ("val", "report")):
        limit = getattr(trainer, f"limit_{split}_batches")
        if limit == 0:
            raise UserError(
                f"trainer.limit_{split}_batches {limit} leaves nothing to {use}; set it to 1 or more, or leave it out"
            )
    if trainer.overfit_batches:  # type: ignore[attr-defined]  # set by a connector
        raise UserError(
            "trainer.overfit_batches would take the order of the batches from the data; set "
            "trainer.limit_train_batches, or a small training set"
        )
    for name in ("check_val_every_n_epoch", "val_check_interval"):
        # A time of validation is kept elsewhere, in seconds.
        if (value := getattr(trainer, name, None)) is not None and value <= 0:
            raise UserError(f"trainer.{name} must be > 0, got {value}")
    for unit in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{unit}"), getattr(trainer, f"max_{unit}") or -1
        if least and 0 < most < least:
            raise UserError(f"trainer.min_{unit} {least} is more than trainer.max_{unit} {most}")
    _check_strategy(trainer, module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        _check_callback(callback, trainer, module)


def _check_strategy(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UserError("trainer.strategy: processes that Lightning spawns or forks keep the result; use ddp")
    if not isinstance(strategy, known := (SingleDeviceStrategy, DDPStrategy, *getattr(module, "strategies", ()))):
        raise UserError(
            f"trainer.strategy {type(strategy).__name__} is not one that {type(module).__name__} trains under: "
            + ", ".join(kind.__name__ for kind in known)
        )
    if getattr(strategy, "_layer_sync", None) is not None and strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm works on GPUs only; leave it out: the statistics are averaged")
    if getattr(strategy, "_ddp_comm_hook", None) is not None and not module.automatic_optimization:
        raise UserError("trainer.strategy: ddp_comm_hook does not see component gradients; leave it out")


def _check_callback(callback: pl.Callback, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    name = f"trainer.callbacks: {type(callback).__name__}"
    for kind, reason in _CALLBACKS.items():
        if isinstance(callback, kind):
            raise UserError(f"{name} {reason}" + ("" if reason.endswith("set it") else "; leave it out"))
    silent = not trainer.loggers or isinstance(trainer.loggers[0], DummyLogger)
    writes = isinstance(callback, callbacks.LearningRateMonitor | callbacks.DeviceStatsMonitor)
    if writes and silent and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        raise UserError(f"{name} writes to a logger, and trainer.logger is false")
    timed = isinstance(callback, callbacks.ModelCheckpoint) and callback._train_time_interval is not None
    if timed and not module.automatic_optimization:
        raise UserError(f"{name}: train_time_interval saves nothing under component gradients; set every_n_train_steps")


def check_batches(trainer: pl.Trainer, train: int, val: int) -> None:
    """Refuse limits that leave no batch, and a validation that never comes.

    Args:
        trainer: The trainer of the run.
        train: Batches of an epoch on one rank, without a limit.
        val: The same of a validation.

    Raises:
        UserError: Naming the setting.
    """
    for split, count in (("train", train), ("val", val)):
        limit = getattr(trainer, f"limit_{split}_batches")
        if isinstance(limit, float) and int(count * limit) < 1:
            raise UserError(
                f"trainer.limit_{split}_batches {limit} of {count} batches is none; set it to at least {1 / count:.3g}"
            )
    interval, used = getattr(trainer, "val_check_interval", None), limited(train, trainer.limit_train_batches)
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > used:
        raise UserError(
            f"trainer.val_check_interval {interval} is more than the {used} batches of an epoch; lower it, or set "
            "trainer.check_val_every_n_epoch to null to count across epochs"
        )


def limited(count: int, limit: Any) -> int:
    """Return how many batches `trainer.limit_train_batches` or `trainer.limit_val_batches` leaves."""
    return min(count, limit) if isinstance(limit, int) else int(count * limit)
