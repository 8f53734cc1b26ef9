"""Preparation of logits: promotion, temperature, standardisation."""

import math

import torch
from torch import Tensor

from kd_common.errors import UserError


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaled_pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Divide both logits by the temperature and shift every row so that its largest value is 0.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive finite number.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}; align their classes (vocabulary) first"
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature must be a positive finite number, got {temperature}")
    return scaled(student_logits, temperature), scaled(teacher_logits, temperature)


def scaled(logits: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """Return the logits below their row's largest, divided by the temperature, in at least float32.

    Args:
        logits: Logits of shape (..., V).
        temperature: Positive divisor.
        left_out: Booleans of shape (..., V), True for logits that do not count for the row's maximum, so that a softmax
            over the others keeps its digits. None counts all.
    """
    # Shift before any rounding: a division or a logsumexp of numbers near 2e4 is wrong by 1e-3 in float32. No gradient
    # passes through the shift, because no softmax depends on it.
    logits = at_least_fp32(logits)
    sought = logits.detach()
    if left_out is not None:
        sought = sought.masked_fill(left_out, torch.finfo(sought.dtype).min / 2)
    return (logits - sought.amax(dim=-1, keepdim=True)).div_(temperature)


def topk_mask(logits: Tensor, k: int, *, eligible: Tensor | None = None) -> Tensor:
    """Return the mask of the k largest logits of every row; ties go to the lower index.

    Args:
        logits: Logits of shape (..., V), without NaN.
        k: Number of places, in [1, V].
        eligible: Booleans of shape (..., V), at least k of them true in every row; the others take no place, and their
            logits must be -inf. None if all are eligible.

    Returns:
        Booleans of shape (..., V), exactly k of them true in every row.
    """
    # A threshold with a count of its ties is several times faster than a stable sort of every row.
    threshold = logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = logits > threshold
    tied = logits == threshold
    if eligible is not None:
        tied &= eligible
    places_left = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= places_left))


def standardize_logits(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return (z - mean(z)) / (std(z) + eps) of every row, with the unbiased standard deviation over the classes.

    A constant row gives zeros with a finite gradient.

    Args:
        logits: Finite logits of shape (..., V), V >= 2.
        eps: Added to the standard deviation.

    Returns:
        Standardised logits of shape (..., V) in at least float32.

    Raises:
        ValueError: If there are fewer than two classes.

    References:
        Logit standardisation in knowledge distillation, arXiv 2403.01427.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"standardize_logits needs at least 2 classes in the last dimension, got {classes}")
    logits = at_least_fp32(logits)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    # torch.std has a NaN gradient on a constant row; the norm has gradient 0 there.
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(classes - 1)
    return centred / (std + eps)
