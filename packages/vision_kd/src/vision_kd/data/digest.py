"""Digests of training data that depend on its content alone, not on names or places."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BYTES_READ = 2**28
"""Number of bytes of image files that are read for a digest, in a quarter of a second."""

FILES_READ = 20_000


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors: their types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_digest(root: Path, files: Sequence[Path], values: Any = None) -> str:
    """Return the SHA-256 of the names, sizes and bytes of files.

    All bytes count as long as they are no more than `BYTES_READ` in at most `FILES_READ` files. Beyond that, every n-th
    file is read, and of the others only name and size count.

    Args:
        root: Folder that the names are relative to.
        files: The files, in the order in which they are used.
        values: Plain values that count too, such as labels.
    """
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256(json.dumps(values).encode())
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{str(file).removeprefix(f'{root}/')}\0{size}\0".encode(errors="surrogateescape"))
    every = max(1, -(-sum(sizes) // BYTES_READ), -(-len(files) // FILES_READ))
    for file in files[::every]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def batches_digest(batches: Iterable[Any]) -> str:
    """Return the SHA-256 of the batches of a loader, up to `BYTES_READ`."""
    digest, read = hashlib.sha256(), 0
    for batch in batches:
        tensors = list(_tensors(batch))
        digest.update(tensors_digest(tensors).encode())
        read += sum(tensor.nbytes for tensor in tensors)
        if read > BYTES_READ:
            break
    return digest.hexdigest()


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for entry in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(entry)
