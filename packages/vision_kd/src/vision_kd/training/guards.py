"""Notice a loss that is no longer a number."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from kd_common.distributed import world_size


class FiniteGuard:
    """Remembers the first batch of an epoch whose loss is not finite, without a host sync per batch.

    Args:
        device: Where the losses live.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._first = torch.full((), -1, device=device)

    def observe(self, losses: Mapping[str, Tensor], batch_idx: int) -> None:
        """Look at the scalar loss components of a batch."""
        finite = torch.stack(list(losses.values())).isfinite().all()
        self._first = torch.where((self._first < 0) & ~finite, batch_idx, self._first)

    def first_bad_batch(self) -> int | None:
        """Index of a first batch with a non-finite loss, or None; waits for the device.

        Every rank must call this: one that stops alone would leave the others waiting for its gradients.
        """
        first = self._first.clone()
        if world_size() > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MAX)
        return None if first < 0 else int(first)
