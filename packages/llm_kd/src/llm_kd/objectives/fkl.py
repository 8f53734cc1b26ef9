"""Forward KL divergence."""

import torch
from torch import Tensor

from kd_common.functional import forward_kl
from llm_kd.objectives.base import Objective, log_ratio


class ForwardKL(Objective):
    """KL(p || q), the divergence of classical distillation (arXiv 1503.02531)."""

    data_processing = True

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row; see `Objective.forward`."""
        return forward_kl(student_logits, teacher_logits, temperature=temperature)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = -p."""
        return -log_p.exp()

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return both at once; see `Objective.value_and_grad`."""
        p = log_p.exp()
        return torch.linalg.vecdot(p, log_ratio(log_p, log_q)), p.neg_()
