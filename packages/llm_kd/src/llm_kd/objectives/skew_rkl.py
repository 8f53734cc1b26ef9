"""Skew reverse KL divergence."""

from torch import Tensor

from kd_common.functional import skew_reverse_kl
from llm_kd.objectives.base import Objective, log_mixture, log_ratio


class SkewReverseKL(Objective):
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898).

    The gradient includes the part through the mixture; DistiLLM-2 stops it there.

    Args:
        alpha: Share of the student in the mixture, in [0, 1).

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
        return skew_reverse_kl(student_logits, teacher_logits, temperature=temperature, alpha=self.alpha)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = q (log(q / m) + 1 - alpha q / m)."""
        ratio = log_ratio(log_q, log_mixture(log_q, log_p, self.alpha))
        # q / m is at most 1 / alpha; without the student in m it has no bound.
        share = self.alpha * ratio.exp() if self.alpha else 0.0
        return log_q.exp() * (ratio + 1 - share)
