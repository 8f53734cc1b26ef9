"""Writer of teacher caches: a kill loses at most the last shard, and a full disk loses nothing."""

import errno
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from kd_common.checks import at_least
from kd_common.files import write_atomically
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher.cache import MANIFEST, CacheError, CacheHeader, Manifest, Shard, TeacherCache, index_checksum

EXAMPLE_BYTES = 48
"""Bytes of an example in the index: key, offset and checksum."""

SHARD_OVERHEAD = 2048
"""Upper bound on the bytes of a shard's header and its line in the manifest."""


class DiskFullError(OSError):
    """The disk is too small for the cache; everything written before is usable."""


class CacheWriter:
    """Context manager that adds examples to a cache.

    Shards and manifest are written to temporary files and renamed, the manifest last. After any interruption the folder
    holds complete shards, and a new writer continues from there. On an ordinary error or a keyboard interrupt the
    examples of the unfinished shard are written too. Leaving the context without an error marks the cache complete.

    Args:
        folder: The cache's folder; made if need be.
        header: Description of the content.
        source: Source of the teacher; see `llm_kd.teacher.cache.Manifest`.
        shard_bytes: Size at which a shard is written; about three times as much memory is used.

    Raises:
        CacheError: On entering, if the folder holds a cache of something else or a damaged one, or another process is
            writing there.
        DiskFullError: If the disk is full.
    """

    def __init__(
        self, folder: str | Path, header: CacheHeader, *, source: str | None = None, shard_bytes: int = 2**26
    ) -> None:
        at_least("shard_bytes", shard_bytes, 1)
        self.folder = Path(folder)
        self.layout = header.layout
        self.shard_bytes = shard_bytes
        self._manifest = Manifest(header, source=source)
        self._stored: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._lock = FileLock(self.folder / ".lock")

    def __enter__(self) -> "CacheWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CacheError(f"another process is writing to {self.folder}; wait for it, or stop it") from error
        try:
            self._resume()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, DiskFullError):
                self._flush()
            if error is None:
                self._publish(replace(self._manifest, complete=True))
        finally:
            self._lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def require_space(self, tokens: int, examples: int) -> None:
        """Raise if the disk is too small for the cache.

        Args:
            tokens: Number of supervised tokens still to be written.
            examples: Number of examples still to be written.

        Raises:
            DiskFullError: If less is free than they take.
        """
        data = tokens * self.layout.bytes_per_token + examples * EXAMPLE_BYTES
        needed = data + (data // self.shard_bytes + 1) * SHARD_OVERHEAD
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise DiskFullError(
                errno.ENOSPC,
                f"{tokens:,} tokens at {self.layout.bytes_per_token} bytes need {needed:,} bytes, {free:,} are free; "
                "choose another disk, a smaller size or dtype float16",
                str(self.folder),
            )

    def add(
        self, keys: Sequence[str], counts: Sequence[int], tokens: Tensor, distribution: TruncatedDistribution
    ) -> None:
        """Add examples.

        Args:
            keys: Keys of the examples, hexadecimal, none of them stored before.
            counts: Number of supervised tokens of each, N in all.
            tokens: Ids of these tokens, shape (N,).
            distribution: The teacher's N rows.

        Raises:
            ValueError: If a key is there already or the numbers do not fit.
            DiskFullError: If the disk is full.
        """
        if any(key in self._stored for key in keys) or len(set(keys)) < len(keys):
            raise ValueError("an example may be stored once only; skip the keys that the writer contains")
        shape = (distribution.vocab_size, distribution.size)
        if shape != (self.layout.vocab_size, self.layout.size):
            raise ValueError(f"the cache stores {self.layout.size} of {self.layout.vocab_size} tokens, got {shape}")
        records = self.layout.pack(tokens, distribution).split(list(counts))
        self._pending.update(zip(keys, records, strict=True))
        self._stored.update(keys)
        if sum(record.numel() for record in self._pending.values()) >= self.shard_bytes:
            self._flush()

    def _resume(self) -> None:
        """Continue from the shards in the folder."""
        for partial in self.folder.glob("*.tmp"):
            partial.unlink()
        if not (self.folder / MANIFEST).is_file():
            self._publish(self._manifest)
            return
        existing = TeacherCache(self.folder)
        if differences := existing.header.differences(self._manifest.header):
            raise CacheError(
                f"{self.folder} holds another cache ({existing.header.teacher}; {'; '.join(differences)}); choose "
                "another folder, or delete it"
            )
        self._stored = set(existing.keys())
        self._manifest = Manifest(existing.header, existing.shards, source=self._manifest.source or existing.source)

    def _flush(self) -> None:
        """Write the pending examples as a shard."""
        if not self._pending:
            return
        records = list(self._pending.values())
        index = {
            "keys": torch.frombuffer(bytearray.fromhex("".join(self._pending)), dtype=torch.uint8).view(-1, 32),
            "offsets": torch.tensor([0, *(len(record) for record in records)]).cumsum(dim=0),
            "checksums": torch.tensor([zlib.crc32(record.contiguous().numpy().data) for record in records]),
        }
        metadata = {"header": self._manifest.header.dumps(), "index": str(index_checksum(index))}
        content = save({"records": torch.cat(records), **index}, metadata)
        name = f"shard-{len(self._manifest.shards):05d}.safetensors"
        shard = Shard(name, len(records), int(index["offsets"][-1]), len(content))
        self._write(name, content)
        self._publish(replace(self._manifest, shards=(*self._manifest.shards, shard)))
        self._pending.clear()

    def _publish(self, manifest: Manifest) -> None:
        self._write(MANIFEST, manifest.dumps())
        self._manifest = manifest

    def _write(self, name: str, content: str | bytes) -> None:
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            examples = sum(shard.examples for shard in self._manifest.shards)
            raise DiskFullError(
                error.errno,
                f"the disk is full; {examples:,} examples are stored and usable. Free some space and start again to "
                "go on from there",
                str(self.folder / name),
            ) from error
