"""Reverse KL divergence."""

from torch import Tensor

from kd_common.functional import reverse_kl
from llm_kd.objectives.base import OBJECTIVES, Objective, log_ratio


@OBJECTIVES.register("rkl")
class ReverseKL(Objective):
    """KL(q || p), the mode-seeking direction (MiniLLM, arXiv 2306.08543)."""

    data_processing = True

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Divergence per row; see :meth:`Objective.forward`."""
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)

    def slope(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Slope h = q (log q - log p + 1)."""
        return log_q.exp() * (log_ratio(log_q, log_p) + 1)
