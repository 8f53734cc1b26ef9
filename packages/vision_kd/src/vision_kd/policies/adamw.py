"""AdamW for transformer students."""

from collections.abc import Sequence

from torch import nn

from kd_common.optim import ComponentOptimizer, DecoupledAdamW
from vision_kd.policies.base import GradientPolicy, decay_matrices_only


class AdamW(GradientPolicy):
    """AdamW on the summed loss, in one backward pass, for transformer students.

    Biases, normalisation weights and the parameters of timm's `no_weight_decay()` are not decayed.

    Args:
        beta2: Decay of the second moment, in [0, 1).
    """

    def __init__(self, beta2: float = 0.999) -> None:
        self.beta2 = beta2

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a `DecoupledAdamW` with one first moment; see `GradientPolicy.optimizer`."""
        groups = decay_matrices_only(student, weight_decay)
        return DecoupledAdamW(groups, lr, dict.fromkeys(components, momentum), self.beta2)
