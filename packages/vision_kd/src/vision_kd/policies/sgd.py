"""One momentum for all components."""

from collections.abc import Sequence

from torch import nn

from kd_common.optim import ComponentOptimizer, DecoupledSGD
from vision_kd.policies.base import GradientPolicy


class SGD(GradientPolicy):
    """SGD on the summed loss, with one momentum for all components and one backward pass."""

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a `DecoupledSGD` with one buffer; see `GradientPolicy.optimizer`."""
        return DecoupledSGD(student.parameters(), lr, dict.fromkeys(components, momentum), weight_decay)
