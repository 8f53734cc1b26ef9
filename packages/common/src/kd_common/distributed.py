"""Collectives that do nothing in a single process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add a tensor up over the ranks, in place, and return it; every rank must call this."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as the parameters and gradients under FSDP2 are."""
    # Importing DTensor to ask isinstance costs seconds in every single-process run.
    return hasattr(tensor, "full_tensor")


def flat_all_reduce_mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of every tensor over the ranks, with one all-reduce of their concatenation.

    Args:
        tensors: Plain tensors on one device; the same shapes in the same order on every rank.

    Returns:
        New tensors of the same shapes and dtypes, views of one buffer; the given tensors themselves when there is
        a single process.
    """
    ranks = world_size()
    if ranks == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat.div_(ranks)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]


def batchnorm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return all that the BatchNorm layers of a network have counted, by its names."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    return {f"{name}.{key}".lstrip("."): buffer for name, layer in layers for key, buffer in layer.named_buffers()}


@torch.no_grad()
def average_batchnorm_buffers(module: nn.Module) -> None:
    """Replace the running means and variances of all BatchNorm layers by their mean over the ranks.

    Under Lightning's manual optimisation DDP broadcasts buffers on the first step only, so the statistics of the ranks
    drift apart. Call this before validation and before a checkpoint. `num_batches_tracked` counts the same steps on
    every rank and stays. A single process does nothing.

    Args:
        module: Network to change in place; every rank must call this.
    """
    buffers = [
        buffer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    for buffer, mean in zip(buffers, flat_all_reduce_mean(buffers), strict=True):
        buffer.copy_(mean)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks one after the other, in the order of the ranks; they may differ in number.

    Args:
        rows: Tensor of shape (n, ...), the same but for n on every rank; every rank must call this.

    Returns:
        The concatenation along the first axis; `rows` itself in a single process.
    """
    ranks = world_size()
    if ranks == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """Return a value that can be pickled of every rank, in the order of the ranks; every rank must call this."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
