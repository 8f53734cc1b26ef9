"""The error of the packages' own checks."""


class UserError(ValueError):
    """A setting, a file or another input cannot be used; the message names it and the remedy.

    A command ends with this message alone. Every other error is a fault and keeps its traceback.
    """
