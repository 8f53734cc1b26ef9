"""Base class of objectives: a divergence per row with its gradient in closed form."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """Divergence between the teacher's and the student's distribution, as a sum over tokens of f(log p, log q).

    The value is differentiable. From the gradient h = df/dlog q the head forms the gradient with respect to the logits,
    (h - q * sum_v h) / T, without autograd. An objective keeps state that follows training in the module's extra state
    and changes it in `on_step` only.

    Attributes:
        data_processing: Whether merging tokens can only lower the divergence (the data-processing inequality, which
            every f-divergence obeys). Then a truncated teacher, whose missing tokens are one category, gives a lower
            bound. Without the property a truncated teacher raises an error.
    """

    data_processing: ClassVar[bool] = False

    @abstractmethod
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | None = 1.0) -> Tensor:
        """Return the divergence per row in nats, without a factor T^2.

        Args:
            student_logits: Student logits of shape (..., V).
            teacher_logits: Teacher logits of shape (..., V).
            temperature: Positive divisor of both logits; None if they are log-probabilities already.

        Returns:
            Values of shape (...), in at least float32.
        """

    @abstractmethod
    def grad_log_q(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the gradient h = df/dlog q of the summand.

        Args:
            log_q: Student log-probabilities of shape (..., V).
            log_p: Teacher log-probabilities of shape (..., V).

        Returns:
            A new tensor of shape (..., V).
        """

    def value_and_grad(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of `forward` and `grad_log_q`; override it where they share terms.

        Args:
            log_q: Student log-probabilities of shape (..., V).
            log_p: Teacher log-probabilities of shape (..., V).

        Returns:
            Values of shape (...) and a new tensor of shape (..., V).
        """
        return self(log_q, log_p, None), self.grad_log_q(log_q, log_p)

    def on_step(self, loss: float, step: int, total_steps: int) -> None:
        """Advance the state after an optimizer step; most objectives have none.

        Args:
            loss: Mean loss of the step, reduced over accumulation and ranks.
            step: Number of optimizer steps done.
            total_steps: Length of training in optimizer steps.
        """

    def _check_settings(self) -> None:
        """Raise the divergence's errors about its settings now instead of at the first batch."""
        self(torch.zeros(1, 2), torch.zeros(1, 2))


def log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(a / b), and 0 where a = 0: every gradient multiplies it by a."""
    return (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return the log of weight * a + (1 - weight) * b, for weight in [0, 1)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight)) if weight else log_b
