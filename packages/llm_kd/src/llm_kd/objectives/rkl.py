"""Reverse KL divergence."""

import torch
from torch import Tensor

from kd_common.functional import reverse_kl
from llm_kd.objectives.base import Objective, log_ratio


class ReverseKL(Objective):
    """KL(q || p), the mode-seeking direction (MiniLLM, arXiv 2306.08543)."""

    data_processing = True

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row; see `Objective.forward`."""
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = q (log q - log p + 1)."""
        return self.value_and_grad(log_q, log_p)[1]

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return both at once; see `Objective.value_and_grad`."""
        q, ratio = log_q.exp(), log_ratio(log_q, log_p)
        return torch.linalg.vecdot(q, ratio), ratio.add_(1).mul_(q)
