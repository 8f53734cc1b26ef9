"""The target / non-target decomposition of the KL divergence and the top-k mask of non-target classes."""

import math

import torch
from torch import Tensor

from kd_common.functional.divergences import kl_from_log_probs
from kd_common.functional.logits import scaled, scaled_pair, topk_mask


def _check_target(logits: Tensor, target: Tensor) -> None:
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(logits.shape[:-1])}, one class index per row of the logits, "
            f"got {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target must hold class indices of dtype torch.int64, got {target.dtype}")


def _is_target(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mask of shape (..., V), True at the target; scatter raises on an index out of range."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, target.unsqueeze(-1), True)


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the target-class and non-target-class parts of forward KL: KL(p || q) = TCKD + (1 - p_target) * NCKD.

    TCKD is the KL divergence of the binary distributions (target, rest). NCKD is the KL divergence of the non-target
    classes, renormalised among themselves. A class mask restricts both softmaxes of NCKD to the surviving classes and
    leaves TCKD alone. There is no hidden T^2 factor.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        target: True class per row, int64 of shape (...), in [0, V - 1].
        temperature: Positive divisor of both logits.
        class_mask: Boolean of shape (..., V), True for the classes that survive in NCKD. The target never does,
            whatever the mask says. None keeps every non-target class.

    Returns:
        TCKD and NCKD per row in nats, each of shape (...), in at least float32. NCKD is 0 where fewer than two
        classes survive.

    Raises:
        ValueError: If shapes or dtypes do not fit or the temperature is not a positive finite number. A target out of
            range raises in PyTorch's scatter.

    References:
        Decoupled knowledge distillation, arXiv 2203.08679, section 3; joint mask: DeepKD, arXiv 2505.15133.
    """
    student, teacher = scaled_pair(student_logits, teacher_logits, temperature)
    _check_target(student, target)
    is_target = _is_target(student, target)
    removed = is_target
    if class_mask is not None:
        if class_mask.shape != student.shape or class_mask.dtype != torch.bool:
            raise ValueError(
                f"class_mask must be a torch.bool tensor of the logits' shape {tuple(student.shape)}, "
                f"got {class_mask.dtype} of shape {tuple(class_mask.shape)}"
            )
        removed = is_target | ~class_mask
    # Far below any logit, yet finite: a row without survivors becomes two equal uniform rows instead of NaN.
    fill = torch.finfo(student.dtype).min / 2

    def target_or_rest(logits: Tensor) -> Tensor:
        of_target = logits.gather(-1, target.unsqueeze(-1))
        of_rest = logits.masked_fill(is_target, fill).logsumexp(dim=-1, keepdim=True)
        return torch.cat([of_target, of_rest], dim=-1).log_softmax(dim=-1)

    def non_target(logits: Tensor) -> Tensor:
        return scaled(logits, temperature, removed).masked_fill(removed, fill).log_softmax(dim=-1)

    tckd = kl_from_log_probs(target_or_rest(teacher), target_or_rest(student))
    nckd = kl_from_log_probs(non_target(teacher_logits), non_target(student_logits))
    return tckd, nckd


def topk_class_mask(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Return the mask of the k non-target classes with the largest teacher logits.

    The target is excluded first and takes none of the k places. Ties go to the lower index, so that the mask is
    deterministic and every row has exactly k survivors.

    Args:
        teacher_logits: Teacher logits of shape (..., V), without NaN.
        target: True class per row, int64 of shape (...), in [0, V - 1].
        k: Number of surviving classes, in [1, V - 1]; V - 1 keeps every non-target class.

    Returns:
        Boolean mask of shape (..., V), True for the survivors.

    Raises:
        ValueError: If k is out of range or the target's shape or dtype does not fit.

    References:
        Dynamic top-k mask of DeepKD, arXiv 2505.15133.
    """
    _check_target(teacher_logits, target)
    classes = teacher_logits.shape[-1]
    if not 1 <= k <= classes - 1:
        raise ValueError(f"k must lie in [1, {classes - 1}] (non-target classes of {classes}), got {k}")
    is_target = _is_target(teacher_logits, target)
    return topk_mask(teacher_logits.masked_fill(is_target, -math.inf), k, eligible=~is_target)
