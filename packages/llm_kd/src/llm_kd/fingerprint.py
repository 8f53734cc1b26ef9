"""What tells one model from another, for the names of what is computed with it."""

import hashlib

import torch
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers: names, shapes, precisions and values.

    It reads every byte once, about a second per gigabyte.

    Args:
        model: Any module; its tensors may lie on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
