"""Spec-k verification in expectation."""

from torch import Tensor

from llm_kd.selection.acceptance import TruncatedDistribution, speck_accept_probability, token_weights
from llm_kd.selection.base import Selection, Selector
from llm_kd.selection.topk import check_gate


class SpecKExpected(Selector):
    """Weight beta + (1 - beta) (1 - TV(p, q)^k), the mean of the Spec-k weight; nothing is random.

    Args:
        k: Number of proposals per token, >= 1.
        beta: Weight of a rejected token, in [0, 1].

    Raises:
        ValueError: If a setting is out of its range.

    References:
        SelecTKD, arXiv 2510.24021; the expectation in closed form is this project's.
    """

    def __init__(self, k: int = 5, beta: float = 0.01) -> None:
        super().__init__()
        check_gate(k, beta)
        self.k = k
        self.beta = beta

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return the probability of acceptance."""
        return speck_accept_probability(student_logits, teacher_logits, self.k)

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return the expected weights; `accepted` holds the probabilities."""
        return Selection(token_weights(score, self.beta), score)
