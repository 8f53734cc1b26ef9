"""Output layers of language models: logits of some rows, and gradients gathered row by row without autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LMHead(NamedTuple):
    """A language model's output layer: logits z = hidden W^T + bias, then softcap * tanh(z / softcap) if set.

    Attributes:
        weight: W of shape (V, H).
        bias: Shape (V,), or None.
        softcap: Gemma-2's final logit soft-cap, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class Projection:
    """Logits of chosen rows over the first `vocab_size` tokens, in the precision the model itself would use.

    Args:
        hidden: Hidden states of shape (N, H).
        head: Output layer.
        vocab_size: Number of tokens V, at most the rows of the head's weight.
    """

    def __init__(self, hidden: Tensor, head: LMHead, vocab_size: int) -> None:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
        self.hidden = hidden.detach().to(dtype)
        self.weight = head.weight.detach()[:vocab_size].to(dtype)
        self.bias = None if head.bias is None else head.bias.detach()[:vocab_size].to(dtype)
        self.softcap = head.softcap

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the logits returned: float32 or wider."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def logits(self, rows: Tensor) -> Tensor:
        """Return new logits of shape (n, V) in at least float32, for row indices of shape (n,)."""
        z = F.linear(self.hidden[rows], self.weight, self.bias).to(self.dtype)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def through_softcap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to the logits before the soft-cap, in place, given the capped logits."""
        return gradient if self.softcap is None else gradient.mul_(1 - (logits / self.softcap) ** 2)


def rows_per_chunk(projection: Projection, bytes_per_logit: float) -> int:
    """Return the number of rows whose logits and temporaries take 64 MiB on a CPU and 1 GiB elsewhere, at least one."""
    budget = 2**26 if projection.hidden.device.type == "cpu" else 2**30
    return max(1, int(budget / (projection.weight.shape[0] * bytes_per_logit)))


class Gradients:
    """Gradients of a scalar with respect to hidden states (N, H), head weight and bias, summed over chunks of rows.

    The head's gradients are summed in at least float32. Inputs that need no gradient cost nothing.

    Args:
        student: Projection of the inputs.
        inputs: Hidden states, weight and bias (or None) as autograd knows them.
    """

    def __init__(self, student: Projection, inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
        hidden, weight, bias = inputs
        self.student = student
        self.hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if tensor is not None and tensor.requires_grad
            else None
            for tensor in (weight, bias)
        )

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add a chunk's share, given its row indices (n,) and its gradient with respect to the raw logits (n, V)."""
        student, vocab_size = self.student, gradient.shape[1]
        if self.hidden is not None:
            self.hidden[rows] = (gradient.to(student.weight.dtype) @ student.weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight[:vocab_size].addmm_(gradient.T, student.hidden[rows].to(gradient.dtype))
        if self.bias is not None:
            self.bias[:vocab_size] += gradient.sum(dim=0)


class ValueWithGradients(torch.autograd.Function):
    """Value with known gradients: `apply(value, gradients, hidden, weight, bias)`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *inputs: Tensor | None) -> Tensor:
        """Return the value itself, shape ()."""
        ctx.gradients = [gradients.hidden, gradients.weight, gradients.bias]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the known gradients times `grad_output`, in place: a copy would cost a second head."""
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were used up by an earlier backward; run the head again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
