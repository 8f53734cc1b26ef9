"""One dry step of all that a run will do, before hours of work."""

import copy
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from kd_common.distributed import world_size
from kd_common.errors import UserError


def alone() -> bool:
    """Return whether this process is alone; a second run of processes that have joined needs them all."""
    return world_size() == 1


class OneBatch:
    """A loader of one batch.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self.batch


@contextmanager
def rehearsing(run_dir: Path | None) -> Iterator[Path]:
    """Yield a folder inside the run's; afterwards restore random state, warnings and Lightning's log.

    Args:
        run_dir: Folder of the run; None for one that writes nothing.

    Raises:
        OSError: If nothing can be written there.
    """
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    with (
        isolate_rng(),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix=".rehearsal_", dir=run_dir) as folder,
    ):
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield Path(folder)
        finally:
            log.setLevel(level)


def dry_fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, accelerator: str) -> Any:
    """Train a copy of a module for one step on one small batch, and validate it on another.

    Args:
        trainer: The trainer of the run, whose precision is taken.
        module: A copy, which is changed.
        data: The prepared data, of whose loaders `sample` gives the batches.
        accelerator: Lightning's name of the hardware.

    Returns:
        The metrics that were logged, by name.
    """
    small: Any = copy.copy(data)
    small.trainer = None
    train, val = (OneBatch(loader.sample(2)) for loader in (small.train_dataloader(), small.val_dataloader()))
    small.train_dataloader, small.val_dataloader = lambda: train, lambda: val
    small.prepare_data, small.setup = lambda: None, lambda stage=None: None
    dry = pl.Trainer(
        fast_dev_run=True,
        max_epochs=trainer.max_epochs,
        accelerator=accelerator,
        devices=1,
        precision=trainer.precision,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dry.fit(module, datamodule=small)
    return dry.callback_metrics


def check_monitors(trainer: pl.Trainer, logged: Collection[str], later: tuple[str, ...] = ()) -> None:
    """Refuse to stop or save by a metric that is never logged; Lightning would say so after the first epoch.

    Args:
        trainer: The trainer of the run.
        logged: Names of the metrics.
        later: Beginnings of names that are logged in some epochs only.

    Raises:
        UserError: Naming the callback and the metrics that there are.
    """
    all_callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    if any(not type(callback).__module__.startswith(("lightning.", "kd_common.")) for callback in all_callbacks):
        return  # which may log metrics of its own
    for callback in all_callbacks:
        watches = isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None
        if watches and callback.monitor not in logged and not callback.monitor.startswith(("lr-", *later)):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} watches {callback.monitor}, which is not logged; there "
                f"are {', '.join(sorted(logged))}"
            )
