"""Divergence of some rows and its gradient with respect to their logits in closed form, without autograd or state."""

import math

import torch
from torch import Tensor

from llm_kd.objectives import Objective
from llm_kd.selection.acceptance import TruncatedDistribution

TAIL_FLOOR = torch.finfo(torch.float32).tiny
"""Smallest tail mass, 1.2e-38; at mass 0, reverse KL and its gradient would be infinite."""


def dense_loss(
    objective: Objective, z: Tensor, z_teacher: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the divergence from the teacher's logits.

    Args:
        objective: The divergence.
        z: Student logits of shape (n, V), divided by the temperature.
        z_teacher: Teacher logits of shape (n, V), divided by the temperature.
        with_gradient: Whether the gradient is wanted.

    Returns:
        Divergences of shape (n,), and their gradient h - q * sum_v h with respect to z, shape (n, V), or None.
    """
    log_q, log_p = z.log_softmax(dim=-1), z_teacher.log_softmax(dim=-1)
    if not with_gradient:
        return objective(log_q, log_p, None), None
    loss, gradient = objective.value_and_grad(log_q, log_p)
    return loss, _through_softmax(gradient, log_q)


def truncated_loss(
    objective: Objective, z: Tensor, teacher: TruncatedDistribution, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the divergence at temperature 1 on K + 1 categories: the K stored tokens and all the others as one.

    The student's logit of the last category is the logsumexp over the other tokens, which avoids 1 - sum. By the chain
    rule its gradient is shared among them in proportion to their probabilities. The stored, rounded probabilities are
    normalised. A tail mass below `TAIL_FLOOR` is raised to it.

    Args:
        objective: The divergence.
        z: Student logits of shape (n, V).
        teacher: N stored rows with K < V.
        with_gradient: Whether the gradient is wanted.

    Returns:
        Divergences of shape (n,), and their gradient with respect to z, shape (n, V), or None.
    """
    indices = teacher.indices.long()
    z_stored = z.gather(-1, indices)
    # Use values relative to a logit of the row: a logsumexp of numbers near 2e4 would be wrong by 1e-3 in float32.
    shift = z_stored.amax(dim=-1, keepdim=True)
    rest = (z - shift).scatter_(-1, indices, -math.inf)
    log_rest = rest.logsumexp(dim=-1, keepdim=True)
    log_q = torch.cat([z_stored - shift, log_rest], dim=-1).log_softmax(dim=-1)
    log_tail = teacher.tail_mass.to(z.dtype).clamp(min=TAIL_FLOOR).log()
    log_p = torch.cat([teacher.log_probs.to(z.dtype), log_tail[:, None]], dim=-1).log_softmax(dim=-1)
    if not with_gradient:
        return objective(log_q, log_p, None), None
    loss, gradient = objective.value_and_grad(log_q, log_p)
    stored, tail = _through_softmax(gradient, log_q).split([teacher.size, 1], dim=-1)
    return loss, rest.sub_(log_rest).exp_().mul_(tail).scatter_(-1, indices, stored)


def _through_softmax(gradient: Tensor, log_q: Tensor) -> Tensor:
    """Turn the gradient h with respect to log q into h - q * sum_v h, the gradient of the logits, overwriting both."""
    total = gradient.sum(dim=-1, keepdim=True)
    return gradient.addcmul_(log_q.exp_(), total, value=-1)
