"""Callbacks of a vision run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure

from kd_common.files import free_name
from kd_common.run.result import best_epoch
from kd_common.run.tensorboard_figures import TensorBoardFigures
from vision_kd.models import save_student
from vision_kd.models.checkpoints import DESCRIPTION, read_checkpoint
from vision_kd.models.student import describe
from vision_kd.training.classification import DistillationModule
from vision_kd.training.component_training import ComponentTraining
from vision_kd.viz.diagnosis import class_correlation, collect_logits
from vision_kd.viz.runs import plot_correlations, plot_reliability


class StudentExport(pl.Callback):
    """Write ``student_last.pt`` after every validation and ``student_best.pt`` after the best one so far.

    The files hold the student alone and load with plain PyTorch; see :func:`vision_kd.models.save_student`.

    Args:
        folder: Where to write.
        extra: Plain values stored beside the weights (the data configuration, for ``vision_kd.evaluate``).
        resumed_from: Checkpoint the run continues. Its run's best student is the best here too, until it is beaten.
    """

    def __init__(self, folder: Path, extra: Mapping[str, Any], resumed_from: str | None = None) -> None:
        self.folder = folder
        self.extra = dict(extra)
        self.resumed_from = resumed_from

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring along the best student of a resumed run, and set aside one of an epoch that its checkpoint precedes."""
        assert isinstance(pl_module, ComponentTraining)
        if self.resumed_from is None or not trainer.is_global_zero or not pl_module.history:
            return
        best = best_epoch(pl_module.history, pl_module.metric, pl_module.mode)
        earlier = Path(self.resumed_from).resolve().parent.parent / "student_best.pt"
        own = self.folder.resolve() / earlier.name
        if own.is_file() and not _is_of(own, best, pl_module.metric):
            own.rename(aside := free_name(own))
            rank_zero_info(f"{own} is of no epoch that this run goes on from; it is now {aside}")
        if earlier != own and earlier.is_file() and _is_of(earlier, best, pl_module.metric):
            shutil.copy(earlier, own)
        elif not own.is_file() and best is pl_module.history[-1]:
            self._export(own.name, pl_module)
        if not own.is_file():
            rank_zero_info(
                f"the student of the best epoch so far, {best['epoch'] + 1}, is not there; {own} is written once an "
                "epoch is better"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Describe the student and its data, so that they are compared wherever the checkpoint is read."""
        assert isinstance(pl_module, ComponentTraining)
        checkpoint[DESCRIPTION] = describe(pl_module.inference_model, pl_module.student_spec) | self.extra

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the student when its epoch was validated."""
        assert isinstance(pl_module, ComponentTraining)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._export("student_last.pt", pl_module)
        if pl_module.history[-1] is best_epoch(pl_module.history, pl_module.metric, pl_module.mode):
            self._export("student_best.pt", pl_module)

    def _export(self, name: str, module: ComponentTraining) -> None:
        latest, metric = module.history[-1], module.metric
        extra = {**self.extra, "epoch": latest["epoch"], metric: latest[metric]}
        save_student(self.folder / name, module.inference_model, module.student_spec, extra=extra)


def _is_of(file: Path, epoch: Mapping[str, Any], metric: str) -> bool:
    """Whether a student file was written at a validation."""
    meta = read_checkpoint(file).meta
    return all(meta.get(name) == epoch[name] for name in ("epoch", metric))


class StudentFigures(TensorBoardFigures):
    """Calibration and correlation of the logits of a classifier beside its teacher's, in TensorBoard.

    Args:
        samples: Validation images they are computed on.
    """

    def __init__(self, samples: int = 512) -> None:
        self.samples = samples

    def figures(self, module: DistillationModule) -> Mapping[str, Figure]:
        """Run student and teacher on the images; a detector has no such logits and gives no figures."""
        if not isinstance(module, DistillationModule):
            return {}
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        networks = {"student": module.inference_model}
        if module.teacher is not None:
            networks = {"teacher": module.teacher, **networks}
        logits = {
            name: collect_logits(network, data.val_dataloader(), module.device, limit=self.samples)
            for name, network in networks.items()
        }
        correlations = {name: class_correlation(z).numpy() for name, (z, _) in logits.items()}
        return {
            "calibration": plot_reliability(logits),
            "correlation": plot_correlations(correlations, data.class_names),
        }
