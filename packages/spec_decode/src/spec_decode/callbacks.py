"""Keep the drafter in its own format while it is trained."""

from pathlib import Path

import lightning.pytorch as pl

from spec_decode.drafters import save_drafter
from spec_decode.module import DrafterModule


class DrafterExport(pl.Callback):
    """Write ``drafter_last`` after every validation, and ``drafter_best`` after the one with the largest tau so far.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the drafter when its epoch was validated."""
        assert isinstance(pl_module, DrafterModule)
        if trainer.sanity_checking or not trainer.is_global_zero or not pl_module.history:
            return
        latest = pl_module.history[-1]
        names = ["drafter_last"]
        if latest is max(pl_module.history, key=lambda epoch: epoch["tau"]):
            names.append("drafter_best")
        meta = {
            "target": pl_module.target_spec.name,
            "epoch": latest["epoch"],
            "tau": latest["tau"],
            "chat_template": getattr(trainer.datamodule, "chat_template", None),  # type: ignore[attr-defined]
        }
        for name in names:
            save_drafter(pl_module.drafter, pl_module.drafter_spec, self.folder / name, meta)
