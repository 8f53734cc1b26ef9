"""Teacher cache on disk: its format and its reader.

A cache is a folder. `manifest.json` describes it and lists the shards. A shard is a safetensors file of packed records
with the index of its examples, read through a memory map. Every read verifies an example's checksum, and opening a
shard verifies its index. Nothing is ever unpickled.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd_common.errors import UserError
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher.records import RecordLayout

FORMAT = "llm_kd.teacher_cache/1"
MANIFEST = "manifest.json"
INDEX = ("keys", "offsets", "checksums")


class CacheError(UserError):
    """A cache is damaged, incomplete, or belongs to something else; the message names the remedy."""


@dataclass(frozen=True)
class CacheHeader:
    """Description of a cache's content, equal for all its shards.

    Attributes:
        teacher: Name of the teacher, for people.
        weights: Fingerprint of its weights, `llm_kd.teacher.weights_fingerprint`.
        tokenizer: Fingerprint of the vocabulary, `llm_kd.teacher.vocabulary_fingerprint`.
        vocab_size: Number V of tokens.
        size: Number K of stored tokens.
        dtype: Precision of the stored log-probabilities.
    """

    teacher: str
    weights: str
    tokenizer: str
    vocab_size: int
    size: int
    dtype: str

    @property
    def layout(self) -> RecordLayout:
        """Layout of the records."""
        return RecordLayout(self.vocab_size, self.size, self.dtype)

    def dumps(self) -> str:
        """Return the record as JSON; every shard repeats it, so that a shard of another cache is noticed."""
        return json.dumps(asdict(self))

    def differences(self, other: "CacheHeader") -> list[str]:
        """Return the differences as "field: value, not the expected one"; the teacher's name does not count."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "teacher")
        return [f"{name}: {value!r}, not {expected!r}" for name, value, expected in pairs if value != expected]


class Shard(NamedTuple):
    """Entry of the manifest for one shard."""

    file: str
    examples: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        header: Description of the content.
        shards: Files of the cache.
        complete: False while examples are still to be written.
        source: Source of the teacher, `llm_kd.models.TeacherSpec.source`, which identifies it without loading it; None
            if unknown.
    """

    header: CacheHeader
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    source: str | None = None

    def dumps(self) -> str:
        """Return the record as JSON, with a few derived numbers for readers."""
        derived = {
            "bytes_per_token": self.header.layout.bytes_per_token,
            "examples": sum(shard.examples for shard in self.shards),
            "tokens": sum(shard.tokens for shard in self.shards),
        }
        shards = [shard._asdict() for shard in self.shards]
        state = {"complete": self.complete, "source": self.source}
        content = {"format": FORMAT, **asdict(self.header), **derived, **state, "shards": shards}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            CacheError: If there is none or it cannot be understood.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(f"{folder} is no teacher cache: it has no {MANIFEST}. Write one with llm_kd.cache_teacher")
        try:
            content = json.loads(path.read_text())
            found = content["format"]
            header = CacheHeader(**{field.name: content[field.name] for field in fields(CacheHeader)})
            shards = tuple(Shard(**shard) for shard in content["shards"])
            manifest = cls(header, shards, content["complete"], content["source"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise CacheError(f"{path} is damaged ({cause}); delete the folder and cache the teacher again") from error
        if found != FORMAT:
            raise CacheError(f"{path} has format {found!r}, this version reads {FORMAT!r}; cache the teacher again")
        return manifest


class Stored(NamedTuple):
    """Stored rows of some examples, one after the other.

    Attributes:
        counts: Number of supervised tokens of each example.
        tokens: Ids of the N supervised tokens, int64.
        distribution: The teacher's N rows, in the stored precision.
    """

    counts: list[int]
    tokens: Tensor
    distribution: TruncatedDistribution


class _Entry(NamedTuple):
    shard: int
    start: int
    stop: int
    checksum: int


class TeacherCache:
    """Reader of a cache; only the index of its examples is held in memory.

    Args:
        folder: Folder of the cache.

    Raises:
        CacheError: If it is no cache, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = Manifest.load(self.folder)
        self.header, self.shards = manifest.header, manifest.shards
        self.complete, self.source = manifest.complete, manifest.source
        self.layout = self.header.layout
        self._records: list[Any] = []
        self._entries: dict[bytes, _Entry] = {}
        for shard in self.shards:
            self._open(shard)

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Iterator[str]:
        """Return the keys of the stored examples, in the order of writing."""
        return (key.hex() for key in self._entries)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._entries

    @property
    def num_tokens(self) -> int:
        """Return the number of supervised tokens stored."""
        return sum(shard.tokens for shard in self.shards)

    def check(self, *, weights: str | None = None, tokenizer: str | None = None, vocab_size: int | None = None) -> None:
        """Compare the cache with its intended use; None skips a property.

        Args:
            weights: Fingerprint of the teacher's weights.
            tokenizer: Fingerprint of the vocabulary.
            vocab_size: Number of tokens.

        Raises:
            CacheError: If something differs.
        """
        expected = {"weights": weights, "tokenizer": tokenizer, "vocab_size": vocab_size}
        wanted = {name: value for name, value in expected.items() if value is not None}
        differences = self.header.differences(CacheHeader(**{**asdict(self.header), **wanted}))
        if differences:
            raise CacheError(
                f"{self.folder} holds another teacher or vocabulary ({self.header.teacher}; {'; '.join(differences)}); "
                "choose another folder, or cache this teacher"
            )

    def check_source(self, source: str) -> None:
        """Compare the cache's teacher with the run's, without loading it.

        Args:
            source: Source of the run's teacher, `llm_kd.models.TeacherSpec.source`.

        Raises:
            CacheError: If it is another one.
        """
        if source != self.source:
            raise CacheError(
                f"{self.folder} holds another teacher: it was written by {self.header.teacher} ({self.source}), the "
                f"one named is {source}. Name that one with its dtype, or cache this one in another folder"
            )

    def read(self, keys: Sequence[str]) -> Stored:
        """Return the stored rows of some examples.

        Args:
            keys: Keys of the examples.

        Returns:
            Rows of keys[0], then of keys[1], and so on.

        Raises:
            CacheError: If an example is missing or its bytes are damaged.
        """
        records = [self._record(key) for key in keys]
        nothing = torch.empty(0, self.layout.bytes_per_token, dtype=torch.uint8)
        tokens, distribution = self.layout.unpack(torch.cat([nothing, *records]))
        return Stored([len(record) for record in records], tokens, distribution)

    def _record(self, key: str) -> Tensor:
        entry = self._entries.get(bytes.fromhex(key))
        if entry is None:
            state = "" if self.complete else ", and its writing was interrupted"
            raise CacheError(
                f"example {key} is not among the {len(self)} of {self.folder}{state}; run llm_kd.cache_teacher on the "
                "same data with the same tokenizer, template and length limit. Responses written in training "
                "(on-policy) need the teacher itself: leave teacher.cache unset"
            )
        record = self._records[entry.shard][entry.start : entry.stop]
        if zlib.crc32(record.numpy().data) != entry.checksum:
            raise self._damaged(self.shards[entry.shard], f"the checksum of example {key} is wrong")
        return record

    def _open(self, shard: Shard) -> None:
        """Map a shard into memory and read its index."""
        path = self.folder / shard.file
        if not path.is_file():
            raise self._damaged(shard, "the file is missing")
        if (size := path.stat().st_size) != shard.bytes:
            raise self._damaged(shard, f"{size} bytes instead of {shard.bytes}")
        try:
            file = safe_open(path, framework="pt")
            index = {name: file.get_tensor(name) for name in INDEX}
            records = file.get_slice("records")
            metadata = file.metadata() or {}
            header, checksum = metadata["header"], int(metadata["index"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(shard, f"{type(error).__name__}: {error}") from error
        if header != self.header.dumps():
            raise self._damaged(shard, f"it was written for {header}, the manifest says {self.header.dumps()}")
        if index_checksum(index) != checksum:
            raise self._damaged(shard, "the checksum of its index is wrong")
        if records.get_shape() != [shard.tokens, self.layout.bytes_per_token]:
            raise self._damaged(shard, f"records of shape {records.get_shape()}")
        keys, offsets, checksums = index["keys"].numpy(), index["offsets"].tolist(), index["checksums"].tolist()
        for row, check in enumerate(checksums):
            self._entries[keys[row].tobytes()] = _Entry(len(self._records), offsets[row], offsets[row + 1], check)
        self._records.append(records)

    def _damaged(self, shard: Shard, reason: str) -> CacheError:
        return CacheError(
            f"{self.folder / shard.file} is damaged ({reason}); delete {self.folder} and cache the teacher again"
        )


def index_checksum(index: dict[str, Tensor]) -> int:
    """Return the CRC-32 over the tensors of a shard's index."""
    checksum = 0
    for name in INDEX:
        checksum = zlib.crc32(index[name].contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum
