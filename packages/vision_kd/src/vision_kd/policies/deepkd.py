"""The decoupled momentum of DeepKD (arXiv 2505.15133)."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from kd_common.optim import ComponentOptimizer, deepkd_sgd
from vision_kd.policies.base import Delta, GradientPolicy, require_parts


class DeepKD(GradientPolicy):
    """Decoupled momentum of DeepKD (arXiv 2505.15133): task and non-target at mu + delta, target at mu - delta.

    Args:
        delta: Distance from mu, one number or `{"task": .., "target": .., "nontarget": ..}`; 0.05 to 0.075 in the
            paper.
        preset: `paper` follows the text. `released` reproduces the published optimizer: the task buffer decays
            with the target's momentum and the weight decay is part of the target gradient.
        decay_component: Component that carries the weight decay. None takes the preset's own. Under `paper` it is a
            separate component with momentum mu that acts exactly as in the SGD baseline (the paper does not specify
            it).
    """

    def __init__(
        self,
        delta: Delta = 0.075,
        preset: Literal["paper", "released"] = "paper",
        decay_component: Literal["weight_decay", "task", "target", "nontarget"] | None = None,
    ) -> None:
        self.delta = delta
        self.preset = preset
        self.decay_component = decay_component

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return the preset's `DecoupledSGD`; see `GradientPolicy.optimizer`."""
        return deepkd_sgd(
            student.parameters(),
            preset=self.preset,
            lr=lr,
            base_momentum=momentum,
            delta=self.delta,
            weight_decay=weight_decay,
            decay_component=self.decay_component,
            aliases=require_parts(self, components),
        )
