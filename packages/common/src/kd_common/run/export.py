"""The trained model in its own format, beside the checkpoints of a run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_common.files import finish_replacing, free_name
from kd_common.run.result import best_epoch

BEST, LAST = "best", "last"


class Export(pl.Callback):
    """Export the best model so far, and the last one: after every validation, or at the end if it is large.

    A resumed run starts with the best model of the run that it continues. Every `TrainingModule` brings this callback,
    unless its trainer has one.

    Args:
        folder: Folder of the run; None for the one that the trainer logs to.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder."""
        if self.folder is None:
            self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put in place what a kill caught between two names, and bring along the best model of a resumed run."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        for which in (BEST, LAST):
            finish_replacing(self._path(module, which))
        if trainer.ckpt_path is not None and module.history and not module.large:
            self._bring_best(module, Path(trainer.ckpt_path).resolve().parent.parent)

    def _bring_best(self, module: Any, earlier_run: Path) -> None:
        """Take the best model of an earlier run, and set aside one of an epoch that its checkpoint precedes."""
        best = best_epoch(module.history, module.metric, module.mode)
        own = self._path(module, BEST).resolve()
        earlier = earlier_run / own.name
        if own.exists() and not _is_of(module.exported_epoch(own), best, module.metric):
            own.rename(aside := free_name(own))
            rank_zero_info(f"{own} is of no epoch that this run goes on from; it is now {aside}")
        if earlier != own and earlier.exists() and _is_of(module.exported_epoch(earlier), best, module.metric):
            (shutil.copytree if earlier.is_dir() else shutil.copy)(earlier, own)
        elif not own.exists() and best is module.history[-1]:
            module.export(own)
        if not own.exists():
            rank_zero_info(
                f"the model of the best epoch so far, {best['epoch'] + 1}, is not there; {own} is written once an "
                "epoch is better"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the model of the epoch that was validated."""
        module: Any = pl_module
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if not module.large:
            module.export(self._path(module, LAST))
        if module.history[-1] is best_epoch(module.history, module.metric, module.mode):
            module.export(self._path(module, BEST))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export a large model as training left it."""
        module: Any = pl_module
        if module.large:
            module.export(self._path(module, LAST))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the last updates are in no exported model."""
        module: Any = pl_module
        if not module.large and not module.validated:
            rank_zero_warn(
                f"{self._path(module, LAST)} lacks the updates after the last validation; let the run end with "
                "a validation, or train with kd_common.run.training.FitTrainer, which adds one"
            )

    def _path(self, module: Any, which: str) -> Path:
        assert self.folder is not None
        return self.folder / module.export_name.format(which)


def _is_of(exported: Mapping[str, Any], epoch: Mapping[str, Any], metric: str) -> bool:
    """Return whether a model was exported at a validation."""
    return all(exported.get(name) == epoch[name] for name in ("epoch", metric))


def exported(run_dir: Path, name: str) -> str:
    """Return the exported models of a run, as one path for the shell; a resumed run may have no best one."""
    found = [which for which in (LAST, BEST) if (run_dir / name.format(which)).exists()]
    return str(run_dir / name.format(found[0] if len(found) == 1 else "{" + ",".join(found) + "}"))
