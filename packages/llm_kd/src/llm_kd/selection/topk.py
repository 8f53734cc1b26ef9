"""Greedy Top-k verification."""

from torch import Tensor

from kd_common.checks import at_least, within
from kd_common.errors import UserError
from llm_kd.selection.acceptance import TruncatedDistribution, token_weights, topk_accept
from llm_kd.selection.base import Selection, Selector


class TopK(Selector):
    """Weight 1 where the student's most likely token is among the teacher's k most likely ones, else beta.

    Args:
        k: Number of acceptable tokens, >= 1.
        beta: Weight of a rejected token, in [0, 1].

    Raises:
        UserError: If a setting is out of its range.

    References:
        SelecTKD, arXiv 2510.24021.
    """

    whole_teacher = False

    def __init__(self, k: int = 5, beta: float = 0.01) -> None:
        super().__init__()
        check_gate(k, beta)
        self.k = k
        self.beta = beta

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise for a k beyond the vocabulary."""
        if self.k > vocab_size:
            raise UserError(f"selector.k must be at most {vocab_size}, the tokens of the vocabulary, got {self.k}")

    def check_truncated(self, size: int, vocab_size: int) -> None:
        """Raise for fewer than k stored tokens; see `Selector.check_truncated`."""
        if self.k > size:
            raise UserError(
                f"k={self.k} needs the teacher's first {self.k} tokens but only {size} are stored; lower k, or store "
                "more tokens"
            )

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return 1 for accepted tokens, else 0."""
        return topk_accept(student_logits, teacher_logits, self.k).to(student_logits.dtype)

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return weights 1 and beta."""
        return Selection(token_weights(score, self.beta), score)


def check_gate(k: int, beta: float) -> None:
    """Raise UserError unless k >= 1 and beta is in [0, 1]."""
    at_least("selector.k", k, 1)
    within("selector.beta", beta, "[0, 1]")
