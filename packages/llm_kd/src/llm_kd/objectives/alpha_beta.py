"""Alpha-beta divergence."""

import math

import torch
from torch import Tensor

from kd_common.functional import alpha_beta
from llm_kd.objectives.base import Objective


class AlphaBeta(Objective):
    """Alpha-beta divergence (ABKD, arXiv 2505.04560): forward KL at (1, 0), reverse KL at (0, 1).

    Args:
        alpha: Power of the teacher, >= 0.
        beta: Power of the student, >= 0; not 0 together with alpha.

    Raises:
        ValueError: If alpha or beta is negative or not finite, or both are 0.
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self._check_settings()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row; see `Objective.forward`."""
        return alpha_beta(student_logits, teacher_logits, self.alpha, self.beta, temperature=temperature)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = q^beta (q^alpha - p^alpha) / alpha, and its limit q^beta log(q / p) at alpha = 0."""
        absent = (log_p == -math.inf) & (log_q == -math.inf)
        gap = (log_q - log_p).masked_fill(absent, 0.0)
        if self.alpha == 0:
            return (self.beta * log_q).exp() * gap.masked_fill(log_q == -math.inf, 0.0)
        # With the larger power factored out, the difference can neither overflow nor cancel.
        power = self.alpha * torch.maximum(log_p, log_q)
        if self.beta:
            power = power + self.beta * log_q
        return power.exp() * gap.sign() * -torch.expm1(-self.alpha * gap.abs()) / self.alpha
