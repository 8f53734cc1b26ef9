"""Base class of selectors: a score per token from the logits of both models, and weights from the scores."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kd_common.errors import UserError
from llm_kd.selection.acceptance import TruncatedDistribution


class Selection(NamedTuple):
    """Selection among N tokens; tensors have shape (N,) and no gradient.

    Attributes:
        weights: Loss weights, >= 0.
        accepted: 1 where the token is selected, 0 where not, or the probability of being selected.
        temperature: Factor on the loss temperature, per token or one for all.
    """

    weights: Tensor
    accepted: Tensor
    temperature: Tensor | float = 1.0


class Selector(nn.Module, ABC):
    """Rule that weights tokens, in two steps so that it never needs the logits of all tokens at once.

    `score` reduces the logits of some rows to one number per row. `select` turns scores into weights. A selector that
    compares tokens with each other sets `per_row` to False and gets the scores of the whole batch. Others may get any
    part. State that follows training belongs in the module's extra state.

    Attributes:
        per_row: Whether a token's weight depends on its own score (and noise) only.
        whole_teacher: Whether the score needs all of the teacher's probabilities, or the selection sets temperatures,
            which does. If not, the teacher's logits may be a `TruncatedDistribution` with K < V.
    """

    per_row: ClassVar[bool] = True
    whole_teacher: ClassVar[bool] = True

    @abstractmethod
    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return one number per token.

        Args:
            student_logits: Student logits at the verification temperature, shape (n, V), in at least float32.
            teacher_logits: Teacher logits of the same shape and dtype; a stored distribution, at temperature 1, only if
                `check_truncated` lets it pass.

        Returns:
            Scores of shape (n,), in the logits' dtype.
        """

    @abstractmethod
    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return the weights of tokens.

        Args:
            score: Scores of shape (n,): all of the batch, or any part of it if `per_row`.
            noise: Result of `draw` for these tokens.

        Returns:
            Selection of the n tokens.
        """

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for a setting that a vocabulary of this size does not allow."""

    def check_truncated(self, size: int, vocab_size: int) -> None:
        """Raise for a stored teacher that does not determine the scores.

        Args:
            size: Number K of stored tokens.
            vocab_size: Number V of all tokens.

        Raises:
            UserError: If it does not; the message names the remedy.
        """
        if self.whole_teacher and size < vocab_size:
            raise UserError(
                f"the selector {type(self).__name__} needs the teacher's whole distribution, but only {size} of "
                f"{vocab_size} tokens are stored; use TopK, EntropyTopP or Uniform, store all tokens, or run the "
                "teacher online"
            )

    def draw(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Return a random numbers for a batch, shape (num_rows,), drawn at once so that chunks do not change them.

        Args:
            num_rows: Number of tokens.
            device: Where the numbers are needed.

        Returns:
            None unless the selector is random.
        """
        return None

    def on_step(self, loss: float, step: int, total_steps: int) -> None:
        """Advance the state after an optimizer step; most selectors have none.

        Args:
            loss: Mean loss of the step, reduced over accumulation and ranks.
            step: Number of optimizer steps done.
            total_steps: Length of training in optimizer steps.
        """


def dense_logits(teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
    """Return the teacher's logits of all tokens, shape (..., V); ValueError if they are not all known."""
    return teacher_logits.dense_log_probs() if isinstance(teacher_logits, TruncatedDistribution) else teacher_logits


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy of softmax(logits) in nats, shape (...)."""
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(dim=-1)


def top_share(score: Tensor, share: float) -> Tensor:
    """Mark the floor(share * N) largest of N scores, at least one; ties go to the earlier token.

    Args:
        score: Scores of shape (N,).
        share: Share to keep, in (0, 1].

    Returns:
        1 where kept, else 0, shape (N,), in the scores' dtype.
    """
    keep = max(1, math.floor(share * len(score) + 1e-9))  # floating point puts 0.29 * 100 below 29
    order = score.argsort(descending=True, stable=True)
    return torch.zeros_like(score).scatter(0, order[:keep], 1.0)
