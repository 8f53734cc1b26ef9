"""Propose and verify: which of the student's next-token proposals the teacher accepts (SelecTKD, arXiv 2510.24021).

The module needs PyTorch only, and nothing here carries a gradient. Logits have shape (..., V); p is the teacher's
distribution, q the student's. The teacher may also be a stored `TruncatedDistribution` if that determines the answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from kd_common.errors import UserError
from kd_common.functional.logits import at_least_fp32, topk_mask

BLOCK = 128
"""Number of tokens in a block; only the few blocks with the largest logits are searched."""


@dataclass(frozen=True)
class TruncatedDistribution:
    """The K most likely tokens of a distribution over V tokens, and the mass of all the others.

    Args:
        log_probs: Log-probabilities in rank order (never increasing along the last dimension), shape (..., K).
        indices: Token ids, integers in [0, V), shape (..., K). Among equal probabilities the stored order is the
            rank.
        tail_mass: Probability of all tokens that are not stored, in [0, 1], shape (...).
        vocab_size: V.
        check: Whether to check order and ids; False for values known to be right.

    Raises:
        ValueError: If the shapes disagree, K is not in [1, V], the log-probabilities are not in rank order or an id is
            not in [0, V).
    """

    log_probs: Tensor
    indices: Tensor
    tail_mass: Tensor
    vocab_size: int
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if self.log_probs.shape != self.indices.shape or self.log_probs.shape[:-1] != self.tail_mass.shape:
            raise ValueError(
                "log_probs and indices must have the same shape (..., K) and tail_mass (...), got "
                f"{tuple(self.log_probs.shape)}, {tuple(self.indices.shape)} and {tuple(self.tail_mass.shape)}"
            )
        _check_k(self.size, self.vocab_size, "the number of stored tokens")
        if check and (self.log_probs[..., 1:] > self.log_probs[..., :-1]).any():
            raise ValueError("log_probs must be in rank order, most likely token first; sort them before storing")
        if check and self.indices.numel() and not 0 <= self.indices.min() <= self.indices.max() < self.vocab_size:
            raise ValueError(f"indices must be token ids in [0, {self.vocab_size})")

    @classmethod
    def from_logits(cls, logits: Tensor, size: int) -> "TruncatedDistribution":
        """Truncate softmax(logits) to its `size` most likely tokens; ties go to the lower id.

        Args:
            logits: Logits of shape (..., V).
            size: K, in [1, V].

        Raises:
            ValueError: If size is outside [1, V] or a logit is NaN or +inf.
        """
        _check_k(size, logits.shape[-1], "size")
        logits = at_least_fp32(logits.detach())
        log_probs = logits.log_softmax(dim=-1)
        if log_probs[..., 0].isnan().any():  # one such logit makes its whole row NaN
            raise UserError("the logits hold NaN or infinity, which have no rank; the model that gave them is broken")
        stored = topk_mask(logits, size)
        indices = stored.nonzero()[:, -1].view(*logits.shape[:-1], size)  # ascending, so a stable sort keeps ties right
        indices = indices.gather(-1, logits.gather(-1, indices).argsort(dim=-1, descending=True, stable=True))
        tail_mass = log_probs.masked_fill(stored, -math.inf).exp().sum(dim=-1)
        return cls(log_probs.gather(-1, indices), indices, tail_mass, logits.shape[-1], check=False)

    @classmethod
    def cat(cls, parts: "Sequence[TruncatedDistribution]") -> "TruncatedDistribution":
        """Return the parts of one teacher, one after the other along the first dimension."""
        log_probs, indices, tail_mass = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("log_probs", "indices", "tail_mass")
        )
        return cls(log_probs, indices, tail_mass, parts[0].vocab_size, check=False)

    @property
    def size(self) -> int:
        """Return the number K of stored tokens."""
        return self.indices.shape[-1]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Tensor | slice) -> "TruncatedDistribution":
        """Select rows by a slice or by indices of the first dimension."""
        return self._map(lambda tensor: tensor[rows])

    def split(self, rows: int) -> "list[TruncatedDistribution]":
        """Return the parts of at most `rows` rows; one empty part when there are none."""
        return [self[start : start + rows] for start in range(0, max(len(self), 1), rows)]

    def to(self, device: torch.device | str) -> "TruncatedDistribution":
        """Return the same distribution on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TruncatedDistribution":
        log_probs, indices, tail_mass = map(change, (self.log_probs, self.indices, self.tail_mass))
        return TruncatedDistribution(log_probs, indices, tail_mass, self.vocab_size, check=False)

    def dense_log_probs(self) -> Tensor:
        """Return all V log-probabilities, shape (..., V), if the stored ones determine them.

        Raises:
            ValueError: If tokens are missing (K < V) and the tail has mass: its split among them is unknown.
        """
        if self.size < self.vocab_size and (self.tail_mass > 0).any():
            raise ValueError(
                f"a teacher truncated to {self.size} of {self.vocab_size} tokens does not say how its tail mass is "
                "split, so nothing that depends on it can be exact; use Top-k or store the whole vocabulary"
            )
        dense = self.log_probs.new_full((*self.log_probs.shape[:-1], self.vocab_size), -math.inf)
        return dense.scatter(-1, self.indices.long(), self.log_probs)


def _check_k(k: int, most: int, name: str = "k") -> None:
    if not 1 <= k <= most:
        raise ValueError(f"{name} must lie in [1, {most}], got {k}")


@torch.no_grad()
def topk_accept(student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution, k: int = 5) -> Tensor:
    """Return whether the student's most likely token is among the teacher's k most likely ones.

    For both models ties go to the lower token id.

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
    proposal = _greedy(student_logits)
    if isinstance(teacher_logits, TruncatedDistribution):
        _check_vocab(student_logits, teacher_logits)
        if k > teacher_logits.size:
            raise UserError(
                f"k={k} needs the teacher's first {k} tokens but only {teacher_logits.size} are stored; lower k"
            )
        return (teacher_logits.indices[..., :k] == proposal).any(dim=-1)
    _check_shapes(student_logits, teacher_logits)
    return _ranks_below(teacher_logits, proposal, k)


def _greedy(logits: Tensor) -> Tensor:
    """Return the id of the largest logit, the lowest among equals, shape (..., 1).

    It equals argmax, which is slow, on one block.
    """
    whole = logits.shape[-1] // BLOCK * BLOCK
    candidates = [whole + logits[..., whole:].argmax(dim=-1, keepdim=True)] if whole < logits.shape[-1] else []
    if whole:
        blocks = logits[..., :whole].unflatten(-1, (-1, BLOCK))
        best = blocks.amax(dim=-1).argmax(dim=-1, keepdim=True)
        inside = blocks.take_along_dim(best[..., None], dim=-2)[..., 0, :].argmax(dim=-1, keepdim=True)
        candidates.insert(0, best * BLOCK + inside)
    ids = torch.cat(candidates, dim=-1)
    return ids.gather(-1, logits.gather(-1, ids).argmax(dim=-1, keepdim=True))


def _ranks_below(logits: Tensor, token: Tensor, k: int) -> Tensor:
    """Return whether fewer than k tokens precede a token (..., 1) in the order of logits and then ids; shape (...).

    Only k blocks of the vocabulary are searched, in the order of their largest logits, ties by number. The blocks with
    a preceding token come first in that order. So the first k blocks hold all preceding tokens or at least k of them.
    """
    score = logits.gather(-1, token)
    whole = logits.shape[-1] // BLOCK * BLOCK
    ids = torch.arange(whole, logits.shape[-1], device=logits.device)
    preceding = _precede(logits[..., whole:], score, ids, token).sum(dim=-1)
    if whole:
        blocks = logits[..., :whole].unflatten(-1, (-1, BLOCK))
        first = blocks.amax(dim=-1).argsort(dim=-1, descending=True, stable=True)[..., :k, None]
        ids = first * BLOCK + torch.arange(BLOCK, device=logits.device)
        inside = _precede(blocks.take_along_dim(first, dim=-2), score[..., None], ids, token[..., None])
        preceding = preceding + inside.sum(dim=(-2, -1))
    return preceding < k


def _precede(logits: Tensor, score: Tensor, ids: Tensor, token: Tensor) -> Tensor:
    return (logits > score) | ((logits == score) & (ids < token))


@torch.no_grad()
def speck_accept_probability(
    student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution, k: int = 5
) -> Tensor:
    """Return the probability 1 - TV(p, q)^k that at least one of k independent proposals of the student is accepted.

    One draw y ~ q is accepted with probability min(1, p(y) / q(y)), in total sum_v min(p_v, q_v) = 1 - TV(p, q). The
    overlap is summed directly, so that small probabilities keep their digits.

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
        raise UserError(f"k must be at least 1, got {k}")
    log_q = at_least_fp32(student_logits).log_softmax(dim=-1)
    if isinstance(teacher_logits, TruncatedDistribution):
        _check_vocab(student_logits, teacher_logits)
        log_p = teacher_logits.dense_log_probs().to(log_q.dtype)
    else:
        _check_shapes(student_logits, teacher_logits)
        log_p = at_least_fp32(teacher_logits).log_softmax(dim=-1)
    overlap = torch.minimum(log_p, log_q).exp().sum(dim=-1).clamp(max=1.0)
    return -torch.expm1(k * torch.log1p(-overlap))


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}; slice both to the tokenizer's vocabulary"
        )


def _check_vocab(student_logits: Tensor, teacher: TruncatedDistribution) -> None:
    if student_logits.shape[-1] != teacher.vocab_size:
        raise UserError(
            f"the stored teacher has a vocabulary of {teacher.vocab_size} tokens, the student's logits have "
            f"{student_logits.shape[-1]}; slice them to the tokenizer's vocabulary"
        )


def token_weights(accepted: Tensor, beta: float = 0.01) -> Tensor:
    """Return the loss weights V = beta + (1 - beta) * accepted.

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
        raise UserError(f"beta must lie in [0, 1], got {beta}")
    accepted = accepted.detach()
    accepted = at_least_fp32(accepted) if accepted.is_floating_point() else accepted.float()
    return beta + (1 - beta) * accepted
