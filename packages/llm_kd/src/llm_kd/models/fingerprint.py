"""What tells one set of weights from another, for the names of what is computed with it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_fingerprint(tensors: Mapping[str, Any], note: str = "") -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors in order; about a second per gigabyte.

    Args:
        tensors: Tensors by name, such as a state dict, on any device; what is no tensor is left out.
        note: Text that is hashed with them.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(note.encode())
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
