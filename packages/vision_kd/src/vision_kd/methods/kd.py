"""Classical knowledge distillation (Hinton et al., arXiv 1503.02531), split exactly into its two parts."""

from torch import Tensor

from kd_common.checks import at_least, positive
from vision_kd.methods.base import (
    Method,
    Views,
    cross_entropy,
    kd_components,
    standardized,
    surviving_classes,
)


class KD(Method):
    """KD loss `ce_weight * CE + kd_weight * T^2 * KL(teacher || student)`.

    The KL term is returned as its exact summands TCKD and (1 - p_target) * NCKD, per sample. The released DeepKD code
    multiplies batch means instead and ignores `kd_weight`.

    Args:
        temperature: T > 0.
        ce_weight: Weight of the cross-entropy, >= 0.
        kd_weight: Weight of the distillation term, >= 0.
        standardize: Z-score the logits first (LSKD); the published setting is T = 2 and `kd_weight` 9.
    """

    def __init__(
        self, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9, standardize: bool = False
    ) -> None:
        positive("temperature", temperature)
        at_least("ce_weight", ce_weight, 0)
        at_least("kd_weight", kd_weight, 0)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.standardize = standardize

    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return task, target and nontarget components; see `Method.__call__`."""
        z, z_teacher = (standardized(logits, self.standardize)["weak"] for logits in (student, teacher))
        mask = surviving_classes(z_teacher, target, k)
        tckd, nckd = kd_components(z, z_teacher, target, self.temperature, mask)
        return {
            "task": self.ce_weight * cross_entropy(student["weak"], target),
            "target": self.kd_weight * tckd,
            "nontarget": self.kd_weight * nckd,
        }
