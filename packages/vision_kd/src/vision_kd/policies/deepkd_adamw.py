"""DeepKD's rule applied to the first moments of AdamW."""

from collections.abc import Sequence

from torch import nn

from kd_common.optim import ComponentOptimizer, deepkd_adamw
from vision_kd.policies.base import Delta, GradientPolicy, decay_matrices_only, require_parts


class DeepKDAdamW(GradientPolicy):
    """DeepKD's rule applied to beta1 of AdamW: mu + delta, mu - delta, mu + delta; two backward passes.

    Biases, normalisation weights and the parameters of timm's `no_weight_decay()` are not decayed.

    Args:
        delta: As in `DeepKD`.
        beta2: Decay of the second moment, in [0, 1).
    """

    def __init__(self, delta: Delta = 0.075, beta2: float = 0.999) -> None:
        self.delta = delta
        self.beta2 = beta2

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a `DecoupledAdamW` with two first moments; see `GradientPolicy.optimizer`."""
        return deepkd_adamw(
            decay_matrices_only(student, weight_decay),
            lr=lr,
            base_beta1=momentum,
            delta=self.delta,
            beta2=self.beta2,
            aliases=require_parts(self, components),
        )
