"""The token weighting of TSD-KD."""

import torch
from torch import Tensor

from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.selection.base import Selection, Selector, dense_logits, entropy


class TSDKD(Selector):
    """Weight sigmoid(H(q) - H(p)) for every token: more where the student is less sure than the teacher.

    This is the weight on the divergence only. The method's entropy and list-wise ranking terms are separate losses.

    References:
        TSD-KD (ICLR 2026).
    """

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return the student's entropy minus the teacher's, in nats."""
        return entropy(student_logits) - entropy(dense_logits(teacher_logits))

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return weights in (0, 1)."""
        return Selection(torch.sigmoid(score), torch.ones_like(score))
