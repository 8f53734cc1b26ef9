"""What a run that ends early says."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_common.run.errors import last_checkpoint, out_of_memory


class ExitMessage(pl.Callback):
    """Says of a run that was interrupted, or had too little memory, what is kept and how to go on."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Print it before Lightning leaves, or the error's own message follows."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            reason = "Interrupted"
        elif out_of_memory(exception):
            reason = "Too little memory (lower data.batch_size, and accumulate batches instead)"
        else:
            return
        last = last_checkpoint(trainer)
        hint = f"go on from there with --ckpt_path {last}" if Path(last).is_file() else "start again, caches are kept"
        rank_zero_info(f"{reason} in epoch {trainer.current_epoch}. Last checkpoint: {last}; {hint}.")
