"""Where what is made once is kept, and how files are written."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder of what is made once and kept: ``$KD_CACHE``, else ``~/.cache/kd``."""
    return Path(os.environ.get("KD_CACHE") or "~/.cache/kd").expanduser()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interruption leaves the old one."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)
