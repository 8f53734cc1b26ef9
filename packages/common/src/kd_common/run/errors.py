"""Errors that every training system raises, what their messages say, and how a command ends with one."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from kd_common.errors import UserError
from kd_common.terminal import printable

TRACEBACK = "KD_TRACEBACK"
"""Environment variable: set, a command shows where an error was raised, whatever it is."""


def run_command(command: Callable[[], Any]) -> None:
    """Run what a command line asks for; a user's error ends it as a mistyped option does, with one message and code 2.

    So does an error of the system about a file that it names. Everything else keeps its traceback.

    Args:
        command: Parses `sys.argv` and does the work.

    Raises:
        SystemExit: With code 2, after the message of a user's error on the standard error; with 130 after Ctrl-C, which
            Lightning itself answers while a model trains; with 143 after SIGTERM, for which Lightning has 0.
    """
    try:
        command()
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        print(
            "\nInterrupted. Answers, features and finished runs of a comparison that were written are used again.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":  # Lightning's, which would end as a finished run does
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    except (UserError, OSError) as error:
        nameless = isinstance(error, OSError) and error.filename is None
        if nameless or os.environ.get(TRACEBACK):
            raise
        print(f"error: {printable(str(error))}\n({TRACEBACK}=1 in the environment shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            error.add_note("The memory is full: smaller batches, shorter sequences or a smaller model need less.")
        raise


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a processor or a GPU has no memory left."""
    # torch's allocator of the processor raises a bare RuntimeError, that of a GPU one of its own.
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return of_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the batch or step and the last good checkpoint."""


def last_checkpoint(trainer: Any) -> str:
    """Return the path of the last checkpoint that a Lightning trainer has written, or words that say there is none."""
    # FitCLI adds the callback that saves every epoch behind the one that saves the best.
    paths = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
    return next(filter(None, reversed(paths)), "none written yet")
