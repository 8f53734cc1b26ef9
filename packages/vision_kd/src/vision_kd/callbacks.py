"""Callbacks of a vision run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure

from kd_common.live import LiveFigures
from vision_kd.diagnosis import class_correlation, collect_logits
from vision_kd.models import save_student
from vision_kd.models.checkpoints import DESCRIPTION
from vision_kd.models.student import describe
from vision_kd.module import DistillationModule
from vision_kd.run_figures import plot_correlations, plot_reliability
from vision_kd.training import ComponentTraining


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
        """Bring the best student of a resumed run along when this run writes to another folder."""
        if self.resumed_from is None or not trainer.is_global_zero:
            return
        best = Path(self.resumed_from).resolve().parent.parent / "student_best.pt"
        if best.is_file() and best.parent != self.folder.resolve():
            shutil.copy(best, self.folder / best.name)

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
        latest = pl_module.history[-1]
        metric = pl_module.metric
        extra = {**self.extra, "epoch": latest["epoch"], metric: latest[metric]}
        names = ["student_last.pt"]
        if latest is max(pl_module.history, key=lambda epoch: epoch[metric]):
            names.append("student_best.pt")
        for name in names:
            save_student(self.folder / name, pl_module.inference_model, pl_module.student_spec, extra=extra)


class StudentFigures(LiveFigures):
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
