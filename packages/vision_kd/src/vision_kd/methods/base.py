"""Base class of methods: a pure map from logits to named per-sample loss components.

A method knows nothing about optimizers, momenta or trainers. It returns one value per sample for every component it
declares. The gradient policy (`vision_kd.policies`) turns the gradients of the components into an update. So every
method runs with every policy, and a new method is one new file in this package.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_common.functional import decoupled_kl, standardize_logits, topk_class_mask

Views = Mapping[str, Tensor]


class Method(ABC):
    """A distillation loss as named components.

    Attributes:
        views: Names of the augmented views the method reads; the DataModule provides them, the student and the teacher
            are run on each.
        components: Names of the components it returns: `task` (gradient of the label loss), `target` (TCKD),
            `nontarget` (NCKD) and, for methods with relations between samples or classes, `relation`.
    """

    views: ClassVar[tuple[str, ...]] = ("weak",)
    components: ClassVar[tuple[str, ...]] = ("task", "target", "nontarget")

    @abstractmethod
    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return the loss components of one batch.

        Args:
            student: Logits of shape (N, C) for every view in `views`.
            teacher: Teacher logits of the same shapes; no gradient is taken through them.
            target: Class indices, shape (N,).
            epoch: Progress in epochs, fractional, for losses that warm up.
            k: Number of non-target classes the dynamic top-k mask lets through, in [1, C - 1]; None means all.

        Returns:
            One tensor of shape (N,) for every name in `components`; the total loss is the mean over samples of
            their sum.
        """

    @property
    def needs_teacher(self) -> bool:
        """Return whether any component reads the teacher."""
        return self.components != ("task",)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy to the label, per sample, shape (N,)."""
    return F.cross_entropy(logits, target, reduction="none")


def standardized(logits: Views, enabled: bool) -> Views:
    """Return the logits of every view, z-scored over the classes when `enabled` (LSKD, arXiv 2403.01427)."""
    return {view: standardize_logits(z) for view, z in logits.items()} if enabled else logits


def surviving_classes(teacher: Tensor, target: Tensor, k: int | None) -> Tensor | None:
    """Return the dynamic top-k mask of shape (N, C), or None when all classes take part."""
    return None if k is None else topk_class_mask(teacher, target, k)


def dkd_components(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, class_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the TCKD and NCKD times T^2 (DKD, arXiv 2203.08679).

    Args:
        student: Logits, shape (N, C).
        teacher: Logits, shape (N, C).
        target: Class indices, shape (N,).
        temperature: T > 0.
        class_mask: Classes that take part in NCKD, shape (N, C), bool; None for all.

    Returns:
        Two tensors of shape (N,).
    """
    tckd, nckd = decoupled_kl(student, teacher, target, temperature=temperature, class_mask=class_mask)
    return temperature**2 * tckd, temperature**2 * nckd


def kd_components(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, class_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the two summands of the classical distillation loss, times T^2; arguments as in `dkd_components`.

    KL(teacher || student) = TCKD + (1 - p_target) * NCKD holds for every sample (arXiv 2203.08679, eq. 5). So without a
    mask the two gradients add up to the gradient of KD.
    """
    tckd, nckd = dkd_components(student, teacher, target, temperature, class_mask)
    # Summed over the other classes instead of 1 - p_target, which would cancel for a confident teacher.
    others = torch.softmax(teacher / temperature, dim=-1).scatter(-1, target.unsqueeze(-1), 0.0)
    return tckd, others.sum(-1) * nckd
