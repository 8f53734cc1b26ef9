"""Skew forward KL divergence."""

import math

from torch import Tensor

from kd_common.functional import skew_forward_kl
from llm_kd.objectives.base import Objective, log_mixture


class SkewForwardKL(Objective):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: Share of the teacher in the mixture, in [0, 1).

    Raises:
        ValueError: If alpha is outside [0, 1).
    """

    data_processing = True

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        self.alpha = alpha
        self._check_settings()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row; see `Objective.forward`."""
        return skew_forward_kl(student_logits, teacher_logits, temperature=temperature, alpha=self.alpha)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = -(1 - alpha) p q / m, and 0 where m = 0."""
        log_m = log_mixture(log_p, log_q, self.alpha)
        absent = (log_p == -math.inf) | (log_q == -math.inf)
        return -(1 - self.alpha) * (log_p + log_q - log_m).masked_fill(absent, -math.inf).exp()
