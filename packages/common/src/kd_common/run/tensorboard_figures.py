"""Figures in TensorBoard while a run goes on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure


class TensorBoardFigures(pl.Callback, ABC):
    """Draw figures of a report after every validation of a fit; does nothing without a TensorBoard logger."""

    @abstractmethod
    def figures(self, module: Any) -> Mapping[str, Figure]:
        """Figures by name.

        Args:
            module: The training module, in evaluation mode.
        """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw on rank 0; what figures draw at random leaves the run's own draws alone."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero or not boards:
            return
        with torch.random.fork_rng():
            drawn = self.figures(pl_module)
        for board in boards:
            for name, figure in drawn.items():
                board.experiment.add_figure(f"figures/{name}", figure, global_step=trainer.global_step)
