"""Temporally adaptive interpolated distillation."""

import math
from typing import Any

from torch import Tensor

from kd_common.checks import at_least, within
from kd_common.errors import UserError
from kd_common.functional.divergences import log_probs
from llm_kd.objectives.base import Objective


class TAID(Objective):
    """Cross-entropy of q to p_t = softmax((1 - t) sg(z) + t z_teacher), t growing from t_start to t_end.

    After optimizer step n with loss L_n: delta = (L_{n-1} - L_n) / (L_{n-1} + 1e-15) and m <- momentum * m + (1 -
    momentum) * delta. Then t becomes the larger of two values, at most t_end: the linear ramp t_start + (t_end -
    t_start) * step / total, and t + rate * sigmoid(m) * (1 - t). The first loss is only stored. The value is the
    method's cross-entropy, not a divergence: it ends at the entropy of p_t, not at 0.

    Args:
        t_start: First t, in (0, 1].
        t_end: Last t, in [t_start, 1].
        rate: Step size alpha of the adaptive part, >= 0.
        momentum: Decay beta of the running relative change of the loss, in [0, 1).

    Raises:
        ValueError: If a setting is out of its range.

    References:
        TAID, arXiv 2501.16937.
    """

    def __init__(self, t_start: float = 0.4, t_end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 < t_start <= t_end <= 1:
            raise UserError(f"0 < t_start <= t_end <= 1 must hold, got t_start={t_start} and t_end={t_end}")
        at_least("rate", rate, 0)
        within("momentum", momentum, "[0, 1)")
        self.t_start = t_start
        self.t_end = t_end
        self.rate = rate
        self.momentum = momentum
        self.t = t_start
        self.trend = 0.0
        self.previous_loss: float | None = None

    def _log_target(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        # At t = 1 the student's term is left out: 0 * -inf would be NaN.
        return log_p if self.t == 1 else (self.t * log_p + (1 - self.t) * log_q).log_softmax(dim=-1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the cross-entropy per row; see `Objective.forward`."""
        log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
        target = self._log_target(log_q.detach(), log_p).exp()
        return -(target * log_q.masked_fill(target == 0, 0.0)).sum(dim=-1)

    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = -p_t."""
        return -self._log_target(log_q, log_p).exp()

    def on_step(self, loss: float, step: int, total_steps: int) -> None:
        """Advance t after an optimizer step; see `Objective.on_step`.

        Raises:
            ValueError: If the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"TAID follows the training loss, which is {loss} after step {step}")
        previous, self.previous_loss = self.previous_loss, loss
        if previous is None:
            return
        change = (previous - loss) / (previous + 1e-15)
        self.trend = self.momentum * self.trend + (1 - self.momentum) * change
        sigmoid = 0.5 * (1 + math.tanh(0.5 * self.trend))  # unlike 1 / (1 + exp(-m)), it cannot overflow
        adaptive = self.t + self.rate * sigmoid * (1 - self.t)
        ramp = self.t_start + (self.t_end - self.t_start) * step / total_steps
        self.t = min(self.t_end, max(ramp, adaptive))

    def get_extra_state(self) -> dict[str, float | None]:
        """Return the state for a checkpoint: t, the running change and the last loss."""
        return {"t": self.t, "trend": self.trend, "previous_loss": self.previous_loss}

    def set_extra_state(self, state: Any) -> None:
        """Restore the state of `get_extra_state`."""
        self.t, self.trend, self.previous_loss = state["t"], state["trend"], state["previous_loss"]
