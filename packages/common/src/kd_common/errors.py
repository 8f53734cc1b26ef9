"""Errors that every training system raises, and what their messages say."""

from typing import Any


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the batch or step and the last good checkpoint."""


def last_checkpoint(trainer: Any) -> str:
    """Path of the last checkpoint that a Lightning trainer has written, or words that say there is none."""
    # FitCLI adds the callback that saves every epoch behind the one that saves the best.
    paths = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
    return next(filter(None, reversed(paths)), "none written yet")
