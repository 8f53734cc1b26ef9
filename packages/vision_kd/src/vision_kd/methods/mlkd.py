"""Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kd_common.checks import at_least, positive
from kd_common.errors import UserError
from vision_kd.methods.base import (
    Method,
    Views,
    cross_entropy,
    kd_components,
    standardized,
    surviving_classes,
)


class MLKD(Method):
    """Instance, batch and class alignment of weak and strong views at several temperatures.

    * The instance term is the KD loss of each view, summed over the temperatures. On the weak view only samples count
      on which the teacher is at most as confident as its batch median. The mask is per sample, whereas released code
      multiplies batch scalars.
    * The relation term sums squared differences of the batch Gram matrix (samples by samples) and of the class Gram
      matrix (classes by classes), over both views. It is a separate component, because it is no part of the label loss.
      Released code uses the weak view alone, and under DeepKD adds the term to the task gradient.

    Args:
        temperatures: Temperatures summed over, each > 0.
        ce_weight: Weight of the cross-entropy of each view.
        kd_weight: Weight of all distillation terms.
        standardize: Z-score the logits of the instance terms first (LSKD; published with T = 2 for 4 and weight 9).
    """

    views: ClassVar[tuple[str, ...]] = ("weak", "strong")
    components: ClassVar[tuple[str, ...]] = ("task", "target", "nontarget", "relation")

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 2.0, 3.0, 5.0, 6.0),
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        standardize: bool = False,
    ) -> None:
        for i, temperature in enumerate(temperatures):
            positive(f"temperatures[{i}]", temperature)
        at_least("ce_weight", ce_weight, 0)
        at_least("kd_weight", kd_weight, 0)
        if not temperatures:
            raise UserError("temperatures is empty; name at least one")
        self.temperatures = tuple(temperatures)
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.standardize = standardize

    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return task, target, nontarget and relation components; see `Method.__call__`."""
        weak_probabilities = torch.softmax(teacher["weak"], dim=-1)
        unsure = at_most_median(weak_probabilities.amax(-1))
        rare = at_most_median(weak_probabilities.sum(0))
        sample_weight = {"weak": unsure, "strong": torch.ones_like(unsure)}
        class_weight = {"weak": rare, "strong": torch.ones_like(rare)}

        task = torch.stack([cross_entropy(student[view], target) for view in self.views]).sum(0)
        tckd = nckd = relation = torch.zeros_like(task)
        z_student, z_teacher = (standardized(logits, self.standardize) for logits in (student, teacher))
        for view in self.views:
            mask = surviving_classes(teacher[view], target, k)
            for temperature in self.temperatures:
                parts = kd_components(z_student[view], z_teacher[view], target, temperature, mask)
                tckd = tckd + sample_weight[view] * parts[0]
                nckd = nckd + sample_weight[view] * parts[1]
                relation = relation + unsure * batch_relation(student[view], teacher[view], temperature)
                relation = relation + class_relation(student[view], teacher[view], temperature, class_weight[view])
        return {
            "task": self.ce_weight * task,
            "target": self.kd_weight * tckd,
            "nontarget": self.kd_weight * nckd,
            "relation": self.kd_weight * relation,
        }


def at_most_median(values: Tensor) -> Tensor:
    """Return 1.0 where a value is at most the (interpolated) median of all, else 0.0; same shape."""
    return (values <= values.quantile(0.5)).to(values.dtype)


def batch_relation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the row sums of the squared difference of the (N, N) Gram matrices of the predictions, shape (N,)."""
    student_p, teacher_p = (torch.softmax(z / temperature, dim=-1) for z in (student, teacher))
    return (teacher_p @ teacher_p.T - student_p @ student_p.T).square().sum(-1)


def class_relation(student: Tensor, teacher: Tensor, temperature: float, classes: Tensor) -> Tensor:
    """Return the mean over classes of the masked squared difference of the (C, C) Gram matrices, a scalar.

    Args:
        student: Logits, shape (N, C).
        teacher: Logits, shape (N, C).
        temperature: T > 0.
        classes: Weight of each class, shape (C,).
    """
    student_p, teacher_p = (torch.softmax(z / temperature, dim=-1) for z in (student, teacher))
    difference = (teacher_p.T @ teacher_p - student_p.T @ student_p).square()
    return (difference.sum(-1) * classes).mean()
