"""Generalised Jensen-Shannon divergence."""

import torch
from torch import Tensor

from kd_common.functional import jensen_shannon
from llm_kd.objectives.base import Objective, log_mixture, log_ratio


class JensenShannon(Objective):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    Args:
        beta: Weight of the teacher in the mixture, in (0, 1).

    Raises:
        ValueError: If beta is outside (0, 1).
    """

    data_processing = True

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        self.beta = beta
        self._check_settings()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row; see `Objective.forward`."""
        return jensen_shannon(student_logits, teacher_logits, temperature=temperature, beta=self.beta)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = (1 - beta) q log(q / m)."""
        return self._grad_log_q(log_q, log_mixture(log_p, log_q, self.beta))

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return both at once; see `Objective.value_and_grad`."""
        log_m = log_mixture(log_p, log_q, self.beta)
        gradient = self._grad_log_q(log_q, log_m)  # the student's half of the value is its sum
        return self.beta * torch.linalg.vecdot(log_p.exp(), log_ratio(log_p, log_m)) + gradient.sum(dim=-1), gradient

    def _grad_log_q(self, log_q: Tensor, log_m: Tensor) -> Tensor:
        return log_ratio(log_q, log_m).mul_(log_q.exp()).mul_(1 - self.beta)
