"""Errors that every training system raises."""


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the batch or step and the last good checkpoint."""
