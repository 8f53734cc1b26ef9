"""Propose and verify: which of the student's next-token proposals the teacher accepts (SelecTKD, arXiv 2510.24021).

PyTorch only, and nothing here carries a gradient. Logits have shape (..., V); p is the teacher's distribution, q the
student's. The teacher may also be a stored :class:`TruncatedDistribution`, wherever that determines the answer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_common.functional.logits import at_least_fp32


@dataclass(frozen=True)
class TruncatedDistribution:
    """The K most likely tokens of a distribution over V tokens, and the mass of all the others.

    Args:
        log_probs: Log-probabilities in rank order (never increasing along the last dimension), shape (..., K).
        indices: Their token ids, shape (..., K). Among equal probabilities the stored order is the rank.
        tail_mass: Probability of all tokens that are not stored, in [0, 1], shape (...).

    Raises:
        ValueError: If the shapes disagree or the log-probabilities are not in rank order.
    """

    log_probs: Tensor
    indices: Tensor
    tail_mass: Tensor

    def __post_init__(self) -> None:
        if self.log_probs.shape != self.indices.shape or self.log_probs.shape[:-1] != self.tail_mass.shape:
            raise ValueError(
                "log_probs and indices must have the same shape (..., K) and tail_mass (...), got "
                f"{tuple(self.log_probs.shape)}, {tuple(self.indices.shape)} and {tuple(self.tail_mass.shape)}"
            )
        if (self.log_probs[..., 1:] > self.log_probs[..., :-1]).any():
            raise ValueError("log_probs must be in rank order, most likely token first; sort them before storing")

    @classmethod
    def from_logits(cls, logits: Tensor, size: int) -> "TruncatedDistribution":
        """Truncate softmax(logits) to its ``size`` most likely tokens; of equal logits the lower id ranks first.

        Args:
            logits: Logits of shape (..., V).
            size: K, in [1, V].

        Raises:
            ValueError: If size is outside [1, V].
        """
        _check_k(size, logits.shape[-1], "size")
        log_probs = at_least_fp32(logits.detach()).log_softmax(dim=-1)
        order = logits.argsort(dim=-1, descending=True, stable=True)
        indices, rest = order[..., :size], order[..., size:]
        return cls(log_probs.gather(-1, indices), indices, log_probs.gather(-1, rest).exp().sum(dim=-1))

    def dense_log_probs(self, vocab_size: int) -> Tensor:
        """All V log-probabilities, shape (..., V), if the stored ones determine them.

        Raises:
            ValueError: If tokens are missing (K < V) and the tail has mass: its split among them is unknown.
        """
        if self.indices.shape[-1] < vocab_size and (self.tail_mass > 0).any():
            raise ValueError(
                f"a teacher truncated to {self.indices.shape[-1]} of {vocab_size} tokens does not say how its tail "
                "mass is split, so Spec-k cannot be verified exactly; use Top-k or store the whole vocabulary"
            )
        dense = self.log_probs.new_full((*self.log_probs.shape[:-1], vocab_size), -math.inf)
        return dense.scatter(-1, self.indices, self.log_probs)


def _check_k(k: int, most: int, name: str = "k") -> None:
    if not 1 <= k <= most:
        raise ValueError(f"{name} must lie in [1, {most}], got {k}")


@torch.no_grad()
def topk_accept(student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution, k: int = 5) -> Tensor:
    """Whether the student's most likely token is among the teacher's k most likely ones.

    Of equal logits the lower token id ranks first, for both models.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V), or a stored distribution with K >= k.
        k: Number of acceptable tokens, in [1, V].

    Returns:
        Booleans of shape (...).

    Raises:
        ValueError: If k is outside [1, V] or above the stored K, or the shapes differ.

    References:
        SelecTKD, greedy Top-k verification.
    """
    vocab_size = student_logits.shape[-1]
    _check_k(k, vocab_size)
    proposal = student_logits.argmax(dim=-1, keepdim=True)
    if isinstance(teacher_logits, TruncatedDistribution):
        stored = teacher_logits.indices.shape[-1]
        if k > stored:
            raise ValueError(f"k={k} needs the teacher's first {k} tokens but only {stored} are stored; lower k")
        return (teacher_logits.indices[..., :k] == proposal).any(dim=-1)
    _check_shapes(student_logits, teacher_logits)
    score = teacher_logits.gather(-1, proposal)
    lower_id = torch.arange(vocab_size, device=proposal.device) < proposal
    rank = ((teacher_logits > score) | ((teacher_logits == score) & lower_id)).sum(dim=-1)
    return rank < k


@torch.no_grad()
def speck_accept_probability(
    student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution, k: int = 5
) -> Tensor:
    """Probability 1 - TV(p, q)^k that at least one of k independent proposals of the student is accepted.

    One draw y ~ q, accepted with probability min(1, p(y) / q(y)), is accepted with probability
    sum_v min(p_v, q_v) = 1 - TV(p, q). That overlap is what is summed, so small probabilities keep their digits.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V), or a stored distribution without missing mass.
        k: Number of proposals, >= 1.

    Returns:
        Probabilities of shape (...), in at least float32.

    Raises:
        ValueError: If k < 1, the shapes differ or a stored distribution does not determine the answer.

    References:
        SelecTKD, Spec-k verification; the closed form follows from speculative sampling, arXiv 2211.17192.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    log_q = at_least_fp32(student_logits).log_softmax(dim=-1)
    if isinstance(teacher_logits, TruncatedDistribution):
        log_p = teacher_logits.dense_log_probs(student_logits.shape[-1])
    else:
        _check_shapes(student_logits, teacher_logits)
        log_p = at_least_fp32(teacher_logits).log_softmax(dim=-1)
    overlap = torch.minimum(log_p, log_q).exp().sum(dim=-1).clamp(max=1.0)
    return -torch.expm1(k * torch.log1p(-overlap))


@torch.no_grad()
def speck_accept(
    student_logits: Tensor,
    teacher_logits: Tensor | TruncatedDistribution,
    k: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whether the teacher accepts at least one of k independent proposals y ~ q, each with chance min(1, p(y) / q(y)).

    The outcome of a row is a coin that shows 1 with probability :func:`speck_accept_probability`, and rows are
    independent; so that coin is thrown, one random number per row, in place of k draws from V tokens.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V), or a stored distribution without missing mass.
        k: Number of proposals, >= 1.
        generator: Source of the random numbers, on the logits' device; PyTorch's default if None.

    Returns:
        Booleans of shape (...).

    Raises:
        ValueError: If k < 1, the shapes differ or a stored distribution does not determine the answer.

    References:
        SelecTKD, Spec-k verification.
    """
    probability = speck_accept_probability(student_logits, teacher_logits, k)
    coin = torch.rand(probability.shape, generator=generator, device=probability.device, dtype=probability.dtype)
    return coin < probability


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}; slice both to the tokenizer's vocabulary"
        )


def token_weights(accepted: Tensor, beta: float = 0.01) -> Tensor:
    """Loss weights V = beta + (1 - beta) * accepted.

    Args:
        accepted: Booleans, or probabilities of acceptance, of shape (...).
        beta: Weight of a rejected token, in [0, 1]; 0 leaves rejected tokens out.

    Returns:
        Weights of shape (...), in at least float32.

    Raises:
        ValueError: If beta is outside [0, 1].

    References:
        SelecTKD, arXiv 2510.24021 (beta = 0.01); its first version, SpecKD, has beta = 0.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    accepted = accepted.detach()
    accepted = at_least_fp32(accepted) if accepted.is_floating_point() else accepted.float()
    return beta + (1 - beta) * accepted


def token_acceptance_rate(accepted: Tensor, valid_mask: Tensor) -> Tensor:
    """Token acceptance rate (TAR): mean of ``accepted`` over the valid tokens.

    Args:
        accepted: Booleans, or probabilities of acceptance, of shape (...).
        valid_mask: Booleans of the same shape, true at the tokens that carry a loss.

    Returns:
        Scalar in [0, 1]; 0 when no token is valid.

    Raises:
        ValueError: If the shapes differ or the mask is not boolean.
    """
    if accepted.shape != valid_mask.shape or valid_mask.dtype != torch.bool:
        raise ValueError(
            f"valid_mask must be boolean and of the shape {tuple(accepted.shape)} of accepted, got "
            f"{valid_mask.dtype} of shape {tuple(valid_mask.shape)}"
        )
    hits = token_weights(accepted, beta=0.0).masked_fill(~valid_mask, 0.0).sum()
    return hits / valid_mask.sum().clamp(min=1)
