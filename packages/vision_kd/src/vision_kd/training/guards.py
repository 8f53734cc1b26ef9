"""Refuse what cannot work before work starts, and stop when a loss is no longer a number."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from kd_common.distributed import world_size
from kd_common.errors import UserError


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


def check_trainer(precision: str | int | None, max_epochs: int | None) -> None:
    """Refuse trainer settings that component gradients or the schedules cannot work with.

    Raises:
        UserError: For fp16 with loss scaling, and for a run without a known length.
    """
    if str(precision) in ("16", "16-mixed"):
        raise UserError(
            f"trainer.precision {precision} scales the loss, and component gradients bypass the scaler; "
            "use bf16-mixed or 32-true"
        )
    if max_epochs is None or max_epochs < 1:
        raise UserError(f"trainer.max_epochs must be at least 1, got {max_epochs}: the schedules run over it")
