"""One live run per folder."""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from kd_common.errors import UserError

Run = TypeVar("Run", bound=Callable[..., Any])
NAME = ".lock"
"""File in the folder of a run that its process locks; only a killed one leaves it behind, unlocked."""

_held: dict[Path, FileLock] = {}


def hold(folder: Path) -> None:
    """Keep the folder of a run for this process, until `let_go` or its end, however it ends.

    Args:
        folder: The folder, which exists.

    Raises:
        UserError: If another process that is still alive holds it.
    """
    path = (folder / NAME).resolve()
    if path in _held:  # by an earlier run of this process, which has ended or never began
        return
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"--run_dir {folder}: a run that is still going on writes there; wait for it or stop it, or name another "
            "folder"
        ) from None
    _held[path] = lock


def let_go(folder: Path) -> None:
    """Let other processes write to the folder of a run that has ended."""
    path = (folder / NAME).resolve()
    if lock := _held.pop(path, None):
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()


def holding_folder(run: Run) -> Run:
    """Wrap what runs a parsed command line, so that its folder is let go at the end."""

    @functools.wraps(run)
    def wrapped(cli: Any, *args: Any) -> Any:
        try:
            return run(cli, *args)
        finally:
            if cli.run_dir is not None:
                let_go(cli.run_dir)

    return wrapped  # type: ignore[return-value]


def _forget() -> None:
    """In a forked process, such as a loader's worker: what outlives the run must not keep its lock."""
    for lock in _held.values():
        with contextlib.suppress(OSError, TypeError):
            os.close(lock._context.lock_file_fd)  # type: ignore[arg-type]
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
