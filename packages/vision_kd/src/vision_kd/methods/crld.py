"""Cross-view consistency regularisation for knowledge distillation (CRLD, ACM MM 2024)."""

from typing import ClassVar

import torch
from torch import Tensor

from kd_common.checks import at_least, positive, within
from vision_kd.methods.base import (
    Method,
    Views,
    cross_entropy,
    kd_components,
    standardized,
    surviving_classes,
)


class CRLD(Method):
    """KD within and across a weak and a strong view, each on the samples the teacher is sure of.

    Within-view terms (weak to weak, strong to strong) count where the teacher's confidence on the weak view reaches
    `weak_threshold`. Cross-view terms (teacher weak to student strong and the reverse) count where its confidence on
    the strong view reaches `strong_threshold`. Both masks are per sample. Released DeepKD code applies them to batch
    scalars, which turns them into constants.

    Args:
        temperature: T > 0.
        ce_weight: Weight of the cross-entropy of each view.
        within_weight: Weight of the within-view terms.
        cross_weight: Weight of the cross-view terms.
        weak_threshold: Teacher confidence in [0, 1] on the weak view.
        strong_threshold: Teacher confidence in [0, 1] on the strong view.
        standardize: Z-score the logits first (LSKD).
    """

    views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        within_weight: float = 2.0,
        cross_weight: float = 0.5,
        weak_threshold: float = 0.9,
        strong_threshold: float = 0.2,
        standardize: bool = False,
    ) -> None:
        positive("temperature", temperature)
        at_least("ce_weight", ce_weight, 0)
        at_least("within_weight", within_weight, 0)
        at_least("cross_weight", cross_weight, 0)
        within("weak_threshold", weak_threshold, "[0, 1]")
        within("strong_threshold", strong_threshold, "[0, 1]")
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.within_weight = within_weight
        self.cross_weight = cross_weight
        self.weak_threshold = weak_threshold
        self.strong_threshold = strong_threshold
        self.standardize = standardize

    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return task, target and nontarget components; see `Method.__call__`."""
        within = self.within_weight * confident(teacher["weak"], self.weak_threshold)
        cross = self.cross_weight * confident(teacher["strong"], self.strong_threshold)

        task = torch.stack([cross_entropy(student[view], target) for view in self.views]).sum(0)
        tckd = nckd = torch.zeros_like(task)
        z_student, z_teacher = (standardized(logits, self.standardize) for logits in (student, teacher))
        for teacher_view in self.views:
            mask = surviving_classes(teacher[teacher_view], target, k)
            for student_view in self.views:
                parts = kd_components(z_student[student_view], z_teacher[teacher_view], target, self.temperature, mask)
                weight = within if student_view == teacher_view else cross
                tckd = tckd + weight * parts[0]
                nckd = nckd + weight * parts[1]
        return {"task": self.ce_weight * task, "target": tckd, "nontarget": nckd}


def confident(logits: Tensor, threshold: float) -> Tensor:
    """Return 1.0 where the largest probability reaches the threshold, else 0.0; shape (N,)."""
    return (torch.softmax(logits, dim=-1).amax(-1) >= threshold).to(logits.dtype)
