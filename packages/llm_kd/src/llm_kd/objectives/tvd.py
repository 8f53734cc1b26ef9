"""Total variation distance."""

from torch import Tensor

from kd_common.functional import total_variation
from llm_kd.objectives.base import Objective


class TotalVariation(Objective):
    """0.5 * sum_v |p_v - q_v| (f-DISTILL, arXiv 2307.15190)."""

    data_processing = True

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the distance per row; see `Objective.forward`."""
        return total_variation(student_logits, teacher_logits, temperature=temperature)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = 0.5 q sign(q - p)."""
        q = log_q.exp()
        return 0.5 * q * (q - log_p.exp()).sign()
