"""The distillation-oriented trainer (DOT, ICCV 2023)."""

from collections.abc import Sequence

from torch import nn

from kd_common.optim import ComponentOptimizer, DecoupledSGD
from kd_common.optim.sgd import WEIGHT_DECAY
from vision_kd.policies.base import GradientPolicy, require_parts


class DOT(GradientPolicy):
    """Distillation-oriented trainer (ICCV 2023): task at mu - delta, all distillation terms at mu + delta.

    Weight decay is a separate component with momentum mu, so it acts as in the SGD baseline.

    Args:
        delta: Distance from mu; 0.075 on CIFAR-100 and 0.09 on ImageNet in the paper.
    """

    def __init__(self, delta: float = 0.075) -> None:
        self.delta = delta

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a `DecoupledSGD` with two buffers and the decay's; see `GradientPolicy.optimizer`."""
        require_parts(self, components)
        momenta = dict.fromkeys(components, momentum + self.delta)
        momenta |= {"task": momentum - self.delta, WEIGHT_DECAY: momentum}
        return DecoupledSGD(student.parameters(), lr, momenta, weight_decay, decay_component=WEIGHT_DECAY)
