"""Layer-wise supervision: what every level is compared with, and by how much it errs.

Shapes: B rows, T tokens, N levels, M supervised positions, C draft tokens, h hidden size. Level i (from 0) at row p of
a teacher-forced pass predicts token p + 2 + i; the target predicts that token at position p + 1 + i.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return -sum over tokens of p log q and its gradient q - p; p and q are softmaxes of target_logits and logits.

    Args:
        logits: Shape (M, C).
        target_logits: Shape (M, C).

    Returns:
        Shape (M,), >= the entropy of p, and the gradient with respect to `logits`, shape (M, C); both without a graph
        and at least in fp32.
    """
    log_q, p = _distributions(logits, target_logits)
    value = -(p * log_q).sum(-1)
    return value, log_q.exp_().sub_(p)


def rejected_mass(logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - sum over tokens of min(p, q), the total variation, and its gradient with respect to the logits.

    It is the probability that a token drawn from q is rejected when the target verifies it, so its fall is the gain in
    acceptance at temperature 1 (Leviathan et al., arXiv 2211.17192, corollary 3.6). This gradient is small where q is
    far from p, which is why it is added to the cross-entropy instead of taking its place.

    Args:
        logits: Shape (M, C).
        target_logits: Shape (M, C).

    Returns:
        Shape (M,), in [0, 1], and the gradient with respect to `logits`, shape (M, C); both without a graph and at
        least in fp32.
    """
    log_q, p = _distributions(logits, target_logits)
    q = log_q.exp_()
    short = q * (q < p)  # tokens of which q holds too little
    return 1 - torch.minimum(p, q).sum(-1), q * short.sum(-1, keepdim=True) - short


def _distributions(logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the drafter's distribution q, and the target's distribution p, at least in fp32."""
    precise = torch.promote_types(torch.promote_types(logits.dtype, target_logits.dtype), torch.float32)
    # Both by the same steps: equal logits must give equal distributions, or rounding would decide the gradient there.
    log_q, log_p = (z.detach().to(precise).log_softmax(-1) for z in (logits, target_logits))
    return log_q, log_p.exp_()


LevelLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Loss of every position, (M,), and its gradient, (M, C), with respect to a level's logits, given the target's."""


def level_loss(acceptance_weight: float) -> LevelLoss:
    """Return the loss `soft_cross_entropy` plus a weighted `rejected_mass`."""
    if not acceptance_weight:
        return soft_cross_entropy

    def both(logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = soft_cross_entropy(logits, target_logits)
        missed, grad_missed = rejected_mass(logits, target_logits)
        return value + acceptance_weight * missed, grad + acceptance_weight * grad_missed

    return both


@dataclass(frozen=True, eq=False)
class LevelBatch:
    """One level's supervised positions of a batch.

    Args:
        rows: Index of the batch row and of the position p of each, int64 of shape (2, M).
        tokens: The token each is to predict, int64 of shape (M,).
        reached: Index into a (B, T) grid of the position of that token, int64 of shape (M,).
    """

    rows: Tensor
    tokens: Tensor
    reached: Tensor


def level_batch(tokens: Tensor, answer: Tensor, level: int) -> LevelBatch:
    """Supervised positions of a level: those whose predicted token exists and belongs to an answer.

    Args:
        tokens: int64 of shape (B, T), right-padded.
        answer: True at tokens to learn from, shape (B, T); False at prompts and padding.
        level: i, from 0.
    """
    row, position = answer[:, 2 + level :].nonzero(as_tuple=True)
    at = position + 2 + level
    return LevelBatch(torch.stack([row, position]), tokens[row, at], row * tokens.shape[1] + at)


def level_weights(levels: int, decay: float) -> list[float]:
    """Return decay^i for every level i, from 0."""
    return [decay**level for level in range(levels)]


def head_loss(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    target_logits: Tensor,
    tokens: Tensor,
    chunk: int,
    parameters: Sequence[Tensor] = (),
    loss: LevelLoss = soft_cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over positions and number of positions whose best draft token is the text's, chunk by chunk.

    Gradients are formed beside the loss, so that no logits outlive their chunk and none are computed twice. Until the
    backward pass every call holds the gradients of its states and of the leaves it depends on, such as a trained head.

    Args:
        head: States (m, h) -> logits (m, C).
        states: States of a level, shape (M, h).
        target_logits: The target's logits there, shape (M, C).
        tokens: Draft token of the text there, int64 of shape (M,).
        chunk: Rows per chunk.
        parameters: Leaves that the head may depend on; gradients reach these and the states, nothing else.
        loss: See `level_loss`.

    Returns:
        Loss, fp32 of shape (), and hits, int64 of shape ().
    """
    learns = torch.is_grad_enabled()
    leaves = [p for p in parameters if p.requires_grad] if learns else []
    return _HeadLoss.apply(head, loss, target_logits, tokens, chunk, learns, states, *leaves)


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`; `learns` says whether gradients are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        objective: LevelLoss,
        target_logits: Tensor,
        tokens: Tensor,
        chunk: int,
        learns: bool,
        states: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, hits = states.new_zeros((), dtype=torch.float32), tokens.new_zeros(())
        grads: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(leaves)
        for part, wanted, token in zip(
            states.split(chunk), target_logits.split(chunk), tokens.split(chunk), strict=True
        ):
            x = part.detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = head(x)
            value, grad = objective(logits, wanted)
            # In fp32: on a CPU it takes several times as long to find the largest of bfloat16 numbers.
            loss, hits = loss + value.sum(), hits + (logits.detach().float().max(-1).indices == token).sum()
            if learns:
                grad_x, *more = torch.autograd.grad(logits, [x, *leaves], grad.to(logits.dtype), allow_unused=True)
                grads.append(grad_x)
                sums = [b if a is None else a if b is None else a.add_(b) for a, b in zip(sums, more, strict=True)]
        ctx.mark_non_differentiable(hits)
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(states), *sums)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*[None] * 6, *(None if grad is None else grad * by for grad in ctx.saved_tensors))


def feature_loss(states: Tensor, final: Tensor) -> Tensor:
    """Sum over positions of the mean smooth-L1 distance to the target's final state, shapes (M, h), in fp32."""
    return F.smooth_l1_loss(states.float(), final.float(), reduction="none").mean(-1).sum()


@dataclass
class AcceptanceTable:
    """Acceptance by level and rank along the backbone, counted over teacher-forced text.

    Attributes:
        hits: Times the text's token was the level's candidate of a rank, where the level was reached; (N, R) numbers.
        reached: Times all levels above had the text's token as their best candidate; N numbers.
    """

    hits: Tensor
    reached: Tensor

    @classmethod
    def empty(cls, levels: int, ranks: int, device: torch.device | str = "cpu") -> "AcceptanceTable":
        """Return a table without counts."""
        return cls(
            torch.zeros(levels, ranks, dtype=torch.float64, device=device),
            torch.zeros(levels, dtype=torch.float64, device=device),
        )

    def count(self, level: int, candidates: Tensor, tokens: Tensor, alive: Tensor) -> Tensor:
        """Count one level; returns which positions reach the next.

        Args:
            level: i, from 0.
            candidates: Tokens by rank, int64 of shape (M, R).
            tokens: The text's tokens, int64 of shape (M,).
            alive: Whether all levels above were right, boolean of shape (M,).
        """
        right = (candidates == tokens.unsqueeze(1)) & alive.unsqueeze(1)
        self.hits[level, : right.shape[1]] += right.sum(0)
        self.reached[level] += alive.sum()
        return right[:, 0]

    def table(self) -> list[list[float]]:
        """Acceptance by level and rank; levels that were never reached are left out."""
        seen = int((self.reached > 0).sum())
        return (self.hits[:seen] / self.reached[:seen].unsqueeze(1)).tolist()


def teacher_forced_acceptance(
    table: AcceptanceTable,
    tokens: Tensor,
    answer: Tensor,
    candidates: Callable[[int, Tensor], Tensor],
    levels: Sequence[Tensor],
) -> None:
    """Count the acceptance of all levels on a batch of text.

    Args:
        table: Table to add to.
        tokens: int64 of shape (B, T), right-padded.
        answer: True at the tokens that count, shape (B, T).
        candidates: (level, states (M, h)) -> target tokens by rank, int64 of shape (M, R).
        levels: States of every level, row p first, shape (B, <= T - 1, h).
    """
    alive = torch.ones(tokens.shape[0], tokens.shape[1], dtype=torch.bool, device=tokens.device)
    for level, states in enumerate(levels):
        batch = level_batch(tokens, answer, level)
        row, position = batch.rows
        survived = table.count(level, candidates(level, states[row, position]), batch.tokens, alive[row, position])
        # A row whose predicted token does not count is not followed further.
        alive = torch.zeros_like(alive)
        alive[row, position] = survived
