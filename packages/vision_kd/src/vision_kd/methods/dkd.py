"""Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679)."""

from torch import Tensor

from kd_common.checks import at_least, positive
from kd_common.schedules import linear_warmup
from vision_kd.methods.base import (
    Method,
    Views,
    cross_entropy,
    dkd_components,
    standardized,
    surviving_classes,
)


class DKD(Method):
    """DKD loss `ce_weight * CE + warm-up * T^2 * (alpha * TCKD + beta * NCKD)`.

    Args:
        temperature: T > 0.
        ce_weight: Weight of the cross-entropy, >= 0.
        alpha: Weight of the target-class term, >= 0.
        beta: Weight of the non-target-class term, >= 0; tuned per pair in the paper (2, 6 or 8 on CIFAR-100).
        warmup_epochs: Epochs over which the distillation terms grow linearly from 0 to their weight.
        standardize: Z-score the logits first (LSKD); the published setting multiplies alpha and beta by 9.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup_epochs: float = 20.0,
        standardize: bool = False,
    ) -> None:
        positive("temperature", temperature)
        at_least("ce_weight", ce_weight, 0)
        at_least("alpha", alpha, 0)
        at_least("beta", beta, 0)
        at_least("warmup_epochs", warmup_epochs, 0)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.standardize = standardize

    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return task, target and nontarget components; see `Method.__call__`."""
        z, z_teacher = (standardized(logits, self.standardize)["weak"] for logits in (student, teacher))
        mask = surviving_classes(z_teacher, target, k)
        tckd, nckd = dkd_components(z, z_teacher, target, self.temperature, mask)
        ramp = linear_warmup(epoch, self.warmup_epochs)
        return {
            "task": self.ce_weight * cross_entropy(student["weak"], target),
            "target": ramp * self.alpha * tckd,
            "nontarget": ramp * self.beta * nckd,
        }
