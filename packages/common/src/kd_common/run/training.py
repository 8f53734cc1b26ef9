"""What the training systems share: draws, schedules and checkpoints by the place in a run."""

import hashlib
import inspect
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from kd_common.distributed import gather_objects
from kd_common.errors import UserError
from kd_common.run.errors import NonFiniteLossError, last_checkpoint
from kd_common.run.export import Export
from kd_common.run.result import Mode
from kd_common.schedules import Schedule

_COUNTS = ("ready", "started", "processed", "completed")
_PARTS = ("total", "current")


def restart_point(loops: dict[str, Any], *, pending: bool) -> None:
    """Write the progress of Lightning's loops anew, so that a resumed run goes on right behind its last whole batch.

    Lightning's own progress depends on the hook in which the checkpoint was written. From some of them it leaves out
    the validation that was due, starts an epoch without its hooks, or reads on behind a batch that was never trained.

    Args:
        loops: `checkpoint["loops"]["fit_loop"]`, changed in place.
        pending: Whether a validation was due behind the last whole batch and had not ended.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    number, batches = epoch["current"]["ready"] - 1, batch["current"]["processed"]
    # Set once a batch was read, before it is trained on.
    last = batch["is_last_batch"] and batch["current"]["ready"] == batches
    seen = batch["total"]["processed"]
    ended = epoch["current"]["processed"] > number
    started = epoch["current"]["started"] > number
    # A run that stopped inside an epoch, at trainer.max_steps for one, counts that as ended.
    inside = batches > 0 and started and not (ended and last)
    if not inside:
        number += ended
        batches, last = 0, False
    for part in _PARTS:
        for count in _COUNTS:
            epoch[part][count] = number + (inside and count in ("ready", "started"))
            batch[part][count] = seen if part == "total" else batches
            # Lightning goes back to a validation of which a batch was started but not processed.
            unfinished = inside and pending
            loops["epoch_loop.val_loop.batch_progress"][part][count] = int(unfinished and count in ("ready", "started"))
    batch["is_last_batch"] = last
    for state in loops["state_dict"].get("combined_loader", []):
        state |= {"epoch": number, "batch": batches, "finished": last}


class TrainingModule(pl.LightningModule):
    """A training system whose checkpoints resume bit for bit, wherever in an epoch they were written.

    Every draw of a step is a function of the seed, the epoch, the batch and the rank. A checkpoint holds what no other
    part of it does: the history, what was accumulated for the next update, and what each rank has of its own.

    Attributes:
        history: Results of the validations so far, in order.
        mode: `max` if a larger value of `metric` is better, `min` if a smaller one is.
        export_name: Name of an exported model, with a pair of braces for `best` or `last`.
        large: Whether a model is too large to export the last one after every validation.
        lr_schedule: Factor on the learning rate.
        seed: Seed of every random draw.
        strategies: Strategies that it can train under, besides one device and DDP.
        clipping: Setting that clips gradients.
    """

    strategies: ClassVar[tuple[type[Any], ...]] = ()
    mode: ClassVar[Mode] = "max"
    export_name: ClassVar[str]
    large: ClassVar[bool] = False
    clipping: ClassVar[str] = "trainer.gradient_clip_val"
    history: list[dict[str, Any]]
    lr_schedule: Schedule
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.history = []
        self._validated_at = -1  # batches trained before the last validation that ended
        self._resumed: dict[str, Any] = {}
        self._touched = False
        self._clock = time.perf_counter()
        self._seconds = 0.0

    def save_hyperparameters(self, *args: Any, frame: Any = None, **kwargs: Any) -> None:
        """Keep the arguments of the constructor; modules among them are small, for they have no weights yet."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attribute .* is an instance of `nn.Module`")
            super().save_hyperparameters(*args, frame=frame or inspect.currentframe().f_back, **kwargs)  # type: ignore[union-attr]

    @property
    def metric(self) -> str:
        """Name of the metric by which validations are compared."""
        raise NotImplementedError

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of the trained parameters."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and the learning-rate schedule, stepped every update."""
        optimizer = self.build_optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def export(self, path: Path) -> None:
        """Write the trained model, as the last validation found it, in its own format.

        Every rank must call this; rank 0 writes.
        """
        raise NotImplementedError

    def exported_epoch(self, path: Path) -> Mapping[str, Any]:
        """Return what `export` wrote beside the weights: `epoch` and `metric`, unless it is large."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[pl.Callback]:
        """Export the best and the last model wherever the trainer saves checkpoints."""
        trainer: Any = self.trainer
        exports = any(isinstance(callback, Export) for callback in trainer.callbacks)
        return [] if exports or trainer.fast_dev_run or not trainer.checkpoint_callbacks else [Export()]

    def obtain(self, data: Any, trainer: pl.Trainer) -> None:
        """Obtain what training needs beside the settings, such as a teacher, and tell the data what the module reads.

        It is called before the data are read and does its work once.

        Args:
            data: DataModule of the run.
            trainer: Trainer of the run.
        """

    # ------------------------------------------------------------------------------------------------ progress

    @property
    def accumulated(self) -> int:
        """Return the batches of an update on one rank."""
        return self.trainer.accumulate_grad_batches

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch."""
        return max(1, math.ceil(self.trainer.num_training_batches / self.accumulated))

    @property
    def total_steps(self) -> int:
        """Updates of the run over which the schedules stretch: all epochs, or `trainer.max_steps` if fewer."""
        limits = [self.trainer.max_steps, (self.trainer.max_epochs or -1) * self.steps_per_epoch]
        return min(limit for limit in limits if limit > 0)

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate at an update, counted from 0."""
        if step == 0:
            # Asked for when the optimizer is built. To count batches by then, Lightning would set up the data before it
            # restores a checkpoint, and forget where inside an epoch the run was.
            return self.lr_schedule(0.0, float(max(1, self.trainer.max_epochs or 1)))
        return self.lr_schedule(step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch)

    @property
    def epoch(self) -> int:
        """Return the number of the epoch that the last batch belongs to, counted from 0, also once that has ended."""
        return max(0, self.trainer.fit_loop.epoch_progress.current.ready - 1)

    @property
    def _batches_seen(self) -> int:
        return self._progress.total.processed

    @property
    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress  # whose counts Lightning declares as fewer than it has

    @property
    def validated(self) -> bool:
        """Return whether the student was validated as the last batch left it."""
        return self._validated_at == self._batches_seen

    def is_logging_step(self) -> bool:
        """Return whether `trainer.log_every_n_steps` asks for values of this update."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        return every > 0 and self.global_step % every == 0

    def log_now(self, values: Mapping[str, float]) -> None:
        """Write this rank's values to the loggers directly: `self.log` costs more than a small network's step."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    def non_finite(self, what: str) -> NonFiniteLossError:
        """Return the error that ends a run with a non-finite loss; it says what was found and what may help."""
        return NonFiniteLossError(
            f"{what}. Last good checkpoint: {last_checkpoint(self.trainer)}. Lower model.learning_rate or set "
            f"{self.clipping}"
        )

    # ------------------------------------------------------------------------------------------------ hooks

    def on_train_start(self) -> None:
        """Restore what a checkpoint holds of this rank, once optimizer and data are there."""
        resumed, self._resumed = self._resumed, {}
        self._clock = time.perf_counter() - resumed.get("seconds", 0.0)
        if resumed:
            self.load_rank_state(resumed)
            # Callbacks that watch a metric may look at an earlier validation's.
            self.trainer._logger_connector._callback_metrics.update(resumed["metrics"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make every draw a function of seed, epoch, batch and rank, so that a resumed run repeats it."""
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))
        # A batch in the middle of an update adds to gradients of others, which no checkpoint has apart.
        self._touched = self.automatic_optimization and self._in_window()
        # Lightning's number for the loggers, which it does not restore exactly.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def on_validation_start(self) -> None:
        """Stop the clock of the training."""
        self._seconds = time.perf_counter() - self._clock

    def on_validation_end(self) -> None:
        """Start it again, until the next validation."""
        self._clock = time.perf_counter()

    def remember(self, values: Mapping[str, Any]) -> None:
        """Add the result of a validation within a fit to the history, with the training's since the last one."""
        if self.trainer.state.fn != "fit":
            return
        place = {"epoch": self.epoch, "step": self.global_step}
        self.history.append({**place, **values, **self.training_since(), "seconds": self._seconds})
        self._validated_at = self._batches_seen

    def training_since(self) -> Mapping[str, Any]:
        """Return the results of the training since the last validation, and start them anew."""
        return {}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def rank_state(self) -> dict[str, Any]:
        """Return the state that this rank alone has between two batches; a subclass adds to it.

        Here: gradients that wait for the rest of their update, the metrics that callbacks watch, and the seconds since
        the last validation.
        """
        metrics = {name: value.clone() for name, value in self.trainer.callback_metrics.items()}
        state: dict[str, Any] = {"seconds": time.perf_counter() - self._clock, "metrics": metrics}
        if self.automatic_optimization and self._in_window():
            state["gradients"] = [None if p.grad is None else p.grad.clone() for p in self._trained()]
        return state

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore `rank_state`."""
        for parameter, gradient in zip(self._trained(), state.get("gradients", []), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _trained(self) -> Iterator[Tensor]:
        return (p for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"])

    def _in_window(self) -> bool:
        """Return whether the last whole batch waits for others before the optimizer steps."""
        progress = self._progress
        ended = progress.is_last_batch and progress.current.ready == progress.current.processed
        return not ended and progress.current.processed % self.accumulated != 0

    def _is_pending(self) -> bool:
        """Return whether a validation is due behind the last batch and has not ended."""
        fit_loop: Any = self.trainer.fit_loop
        progress = self._progress.current
        if self.validated or not progress.processed or progress.ready > progress.processed:
            return False
        return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history, each rank's state, and whether a validation is due."""
        checkpoint["history"] = self.history
        checkpoint["run"] = {
            "validated_at": self._validated_at,
            "pending": self._is_pending(),
            "ranks": gather_objects(self.rank_state()),
            "whole": self.is_whole(),
        }
        self._save_settings(checkpoint)

    def _save_settings(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings in plain types, from which `load_from_checkpoint` builds the module.

        Without those that cannot be told from an object; it then has to be given them.
        """
        makers = [vars(base)["__init__"] for base in type(self).__mro__ if "__init__" in vars(base)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters}
        settings = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        for name, value in {**self.hparams, **self.saved_data_spec()}.items():
            if name in known:
                try:
                    settings[name] = plain(value)
                except AttributeError:
                    continue
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = settings

    def saved_data_spec(self) -> dict[str, Any]:
        """Arguments of the constructor that come from the data, which a configuration does not hold."""
        return {}

    def is_whole(self) -> bool:
        """Return whether a run resumes exactly from here: not where an error ends a step that has changed something."""
        return not (self._touched and self._in_batch())

    def _in_batch(self) -> bool:
        progress = self._progress.current
        return progress.started > progress.processed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them; a run on more ranks than before starts those with rank 0's state.

        Raises:
            UserError: If an error ended the run while it changed the student, so that no state is whole.
        """
        self.history = list(checkpoint["history"])
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        run = checkpoint["run"]
        if not run["whole"]:
            raise UserError(
                "the checkpoint was written by an error in the middle of an update, from where no run resumes "
                "exactly; resume from the one before it, such as checkpoints/last.ckpt"
            )
        restart_point(checkpoint["loops"]["fit_loop"], pending=run["pending"])
        self._validated_at = run["validated_at"]
        ranks = run["ranks"]
        self._resumed = ranks[self.global_rank] if self.global_rank < len(ranks) else ranks[0]


def plain(value: Any) -> Any:
    """Return a setting in the types of a configuration file; an object as its class and the arguments that made it.

    Raises:
        AttributeError: If an object does not keep an argument under its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    names = inspect.signature(type(value)).parameters
    settings = {name: plain(getattr(value, name)) for name in names}
    return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": settings}


def step_seed(*place: Any) -> int:
    """Return the seed of the draws at a place in a run, such as seed, epoch, batch and rank."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, place)).encode()).digest()[:7], "big")


class FitTrainer(pl.Trainer):
    """A trainer that validates the student as the last update left it, wherever the run ends.

    Lightning alone ends without at `max_steps` or `max_time` inside an epoch, and after an epoch that
    `check_val_every_n_epoch` leaves out: what is exported and saved as the last student would be an earlier one.
    """

    def _run_stage(self) -> Any:
        results = super()._run_stage()
        module = self.lightning_module
        if self.training and isinstance(module, TrainingModule) and not module.validated:
            self.validating = True
            self.fit_loop.epoch_loop.val_loop.run()
            self.training = True
        return results


def obtain_for(data: pl.LightningDataModule) -> None:
    """Let the module that a DataModule's trainer trains obtain what both need; without a trainer do nothing."""
    if data.trainer is not None and isinstance(module := data.trainer.lightning_module, TrainingModule):
        module.obtain(data, data.trainer)
