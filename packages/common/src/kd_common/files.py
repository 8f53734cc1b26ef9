"""Cache location, atomic writes and checksummed reads."""

import itertools
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_common.errors import UserError

logger = logging.getLogger(__name__)

CHECKSUM = "crc32"
"""Key of the checksum in a line of `checksummed_line`."""


def cache_root() -> Path:
    """Return the cache folder: `$KD_CACHE`, else `~/.cache/kd`."""
    return Path(os.environ.get("KD_CACHE") or "~/.cache/kd").expanduser()


@contextmanager
def locked(path: Path, what: str, variable: str = "KD_CACHE") -> Iterator[None]:
    """Let one process at a time create a cached file or folder; a waiting process logs that it waits.

    A finished entry needs no lock. Callers look for it first, so that a read-only cache works.

    Args:
        path: File or folder to create; the lock file stands next to it.
        what: Description for the messages, such as "the teacher resnet20".
        variable: Environment variable that names another place, for the message.

    Raises:
        OSError: If the folder cannot be written; the message names it.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Waiting for another process, which is making %s: %s", what, path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise OSError(
            getattr(error, "errno", None) or 0,
            f"{what} is not there yet and cannot be made, because the folder cannot be written or locked "
            f"({getattr(error, 'strerror', None) or error}); make it writable, or name another place with {variable}",
            str(path.parent),
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def naming(path: Path, advice: str) -> Iterator[None]:
    """Add the file's name to errors of the disk, which the system leaves out for failed writes.

    Args:
        path: The file that is written inside.
        advice: State of the file and remedy, for the message.

    Raises:
        OSError: As raised inside, with the file's name and the advice.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(path)) from error


def write_temporary(path: Path, content: str | bytes | memoryview, partial: Path) -> None:
    """Write the temporary file that will replace a file, and flush it to the disk.

    Args:
        path: The file, for the message.
        content: Bytes, or text that is written as UTF-8.
        partial: Where to write.

    Raises:
        OSError: If it cannot be written; nothing is left behind. The message names the file.
    """
    try:
        with naming(path, "not written, and what was there before is unchanged"), partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # The path may be taken by something other than a file.
        if partial.is_file() or partial.is_symlink():
            partial.unlink()
        raise


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace a file in one step, so that an interruption, a full disk or a power cut leaves the old one.

    Args:
        path: The file.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        OSError: If it cannot be written; nothing is left behind. The message names the file.
    """
    partial = path.with_name(f"{path.name}.tmp")
    write_temporary(path, content, partial)
    try:
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def free_name(path: Path) -> Path:
    """Return the first of `name_1.ending`, `name_2.ending`, ... that is not there, to keep an older file under."""
    return next(p for n in itertools.count(1) if not (p := path.with_stem(f"{path.stem}_{n}")).exists())


def staging_paths(folder: Path) -> tuple[Path, Path]:
    """Return two paths: where a folder's successor is written, and where the folder waits meanwhile."""
    partial, old = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "old"))
    return partial, old


def replace_folder(folder: Path) -> None:
    """Put the complete folder at `staging_paths` in the place of a folder, which need not exist.

    Folders cannot be exchanged in one step. `replacing_stopped` detects a stop in between, and `finish_replacing`
    repairs it.
    """
    partial, old = staging_paths(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # deleting in place could be interrupted half-way
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replacing_stopped(folder: Path) -> bool:
    """Return whether a killed program left `replace_folder` between its two renames."""
    return not folder.exists() and all(other.is_dir() for other in staging_paths(folder))


def finish_replacing(folder: Path) -> None:
    """Finish a replacement that a killed program left in `replace_folder`; do nothing otherwise."""
    if replacing_stopped(folder):
        partial, old = staging_paths(folder)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        hint: Remedy for a damaged file, for the message.

    Raises:
        UserError: If it is not one JSON object in UTF-8; the message names the file and the hint.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        raise UserError(f"{path} is damaged, no JSON ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds {type(content).__name__}, no JSON object; {hint}")
    return content


def complete_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file with their ends.

    A missing file has none. The last line is left out if it is torn, as a killed writer leaves it.
    """
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def checksummed_line(record: dict[str, Any]) -> bytes:
    """Return a record as a line of JSON that carries the checksum of the rest."""
    return json.dumps({**record, CHECKSUM: _checksum(record)}).encode() + b"\n"


def read_checksummed_line(line: bytes) -> dict[str, Any]:
    """Return the record of a line that `checksummed_line` wrote.

    Raises:
        ValueError: If it is no JSON object, or its checksum is wrong.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError(f"no JSON object ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, but {type(record).__name__}")
    if record.pop(CHECKSUM, None) != _checksum(record):
        raise ValueError("its checksum is wrong")
    return record


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def damaged_entry(path: Path) -> str | None:
    """Return the name of the first damaged entry of a zip archive, such as a file of `torch.save`; None without damage.

    `torch.load` does not compare the checksums that these archives carry.

    Raises:
        OSError: If the archive cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Reading a compressed entry could unpack it to a thousand times its size.
            packed = (e.filename for e in archive.infolist() if e.compress_type or e.file_size > path.stat().st_size)
            return (
                next((f"{name}, compressed, which torch.save never does" for name in packed), None) or archive.testzip()
            )
    # Damage to the directory at the archive's end, or to an entry's header, raises almost any error.
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        return f"its directory ({error})"
