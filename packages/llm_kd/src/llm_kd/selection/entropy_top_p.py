"""Selection of the tokens with the largest student entropy."""

from torch import Tensor

from kd_common.checks import within
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.selection.base import Selection, Selector, entropy, top_share


class EntropyTopP(Selector):
    """Keep the share p of the batch's tokens with the largest student entropy.

    Args:
        p: Share of tokens to keep, in (0, 1].

    Raises:
        ValueError: If p is outside (0, 1].
    """

    per_row = False
    whole_teacher = False

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        within("p", p, "(0, 1]")
        self.p = p

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return the entropy of the student's distribution in nats."""
        return entropy(student_logits)

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return the most uncertain tokens of the batch."""
        kept = top_share(score, self.p)
        return Selection(kept, kept)
