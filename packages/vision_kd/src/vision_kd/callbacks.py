"""Callbacks of a vision run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vision_kd.models import save_student
from vision_kd.module import DistillationModule


class StudentExport(pl.Callback):
    """Write ``student_last.pt`` after every validation and ``student_best.pt`` after the best one so far.

    The files hold the student alone and load with plain PyTorch; see :func:`vision_kd.models.save_student`.

    Args:
        folder: Where to write.
        extra: Plain values stored beside the weights (the data configuration, for ``vision_kd.evaluate``).
    """

    def __init__(self, folder: Path, extra: Mapping[str, Any]) -> None:
        self.folder = folder
        self.extra = dict(extra)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the student when its epoch was validated."""
        assert isinstance(pl_module, DistillationModule)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        latest = pl_module.history[-1]
        extra = {**self.extra, "epoch": latest["epoch"], "top1": latest["top1"]}
        names = ["student_last.pt"]
        if latest is max(pl_module.history, key=lambda epoch: epoch["top1"]):
            names.append("student_best.pt")
        for name in names:
            save_student(self.folder / name, pl_module.inference_model, pl_module.student_spec, extra=extra)
