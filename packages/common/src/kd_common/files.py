"""Where what is made once is kept, and how files are written."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder of what is made once and kept: ``$KD_CACHE``, else ``~/.cache/kd``."""
    return Path(os.environ.get("KD_CACHE") or "~/.cache/kd").expanduser()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that an interruption, a full disk or a power cut leaves the old one.

    Args:
        path: the file.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
