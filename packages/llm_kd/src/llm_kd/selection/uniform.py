"""No selection."""

from torch import Tensor

from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.selection.base import Selection, Selector


class Uniform(Selector):
    """Weight 1 for every token: plain distillation."""

    whole_teacher = False

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return one for every token."""
        return student_logits.new_ones(len(student_logits))

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return all tokens, weight 1."""
        return Selection(score, score)
