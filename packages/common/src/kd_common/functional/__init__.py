"""Pure functions of logits of shape (..., V) that return one value per row; they need PyTorch only."""

from kd_common.functional.decoupled import decoupled_kl, topk_class_mask
from kd_common.functional.divergences import (
    alpha_beta,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from kd_common.functional.logits import standardize_logits

__all__ = [
    "alpha_beta",
    "decoupled_kl",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "standardize_logits",
    "topk_class_mask",
    "total_variation",
]
