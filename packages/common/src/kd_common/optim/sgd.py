"""SGD with one momentum per gradient component."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kd_common.errors import UserError
from kd_common.optim.base import ComponentOptimizer, bucket_components

WEIGHT_DECAY = "weight_decay"
"""Reserved name of a component that consists of the weight decay alone, for which no gradient is passed."""


class DecoupledSGD(ComponentOptimizer):
    """SGD with decoupled momentum: `v_c <- m_c v_c + g_c`, then `theta <- theta - lr sum_c v_c`.

    There is no dampening and no Nesterov term; at the first step `v_c = g_c`. With equal momenta it equals
    `torch.optim.SGD` on the summed gradient. Components that share a momentum share a buffer, see `ComponentOptimizer`.
    A step costs one backward pass and one buffer per distinct momentum.
    step: one backward pass and one buffer per distinct momentum.

    Weight decay adds `weight_decay * theta` to the gradient of one component, at every parameter with a gradient in any
    component. A component named "weight_decay" consists of the decay alone: `step` takes no gradient for it. It is
    inactive in groups whose weight_decay is 0.

    Args:
        params: Parameters or parameter groups with their own lr and weight_decay.
        lr: Learning rate, >= 0.
        momenta: Momentum per component, in [0, 1); shared by all groups.
        weight_decay: L2 coefficient, >= 0.
        decay_component: Component that carries the weight decay; None for the first of `momenta`.
        decay_last: False: the decay reads the parameters as they were before the step. True: all other components
            move the parameters first and the decay reads the moved ones; its component then keeps a buffer of its own.

    Raises:
        UserError: If a setting is out of range, `decay_component` has no momentum, or "weight_decay" has a
            momentum but is not the `decay_component`.

    References:
        DeepKD, arXiv 2505.15133.
    """

    coefficient = "momenta"
    shared = ("momenta", "decay_component", "decay_last")

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momenta: Mapping[str, float],
        weight_decay: float = 0.0,
        *,
        decay_component: str | None = None,
        decay_last: bool = False,
    ) -> None:
        decay_component = next(iter(momenta), None) if decay_component is None else decay_component
        if momenta and decay_component not in momenta:
            raise UserError(f"decay_component '{decay_component}' has no momentum: momenta names {list(momenta)}")
        if WEIGHT_DECAY in momenta and decay_component != WEIGHT_DECAY:
            raise UserError(
                f"momenta names '{WEIGHT_DECAY}', the component made of the decay alone, but decay_component is "
                f"'{decay_component}': drop the one or set the other to '{WEIGHT_DECAY}'"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "momenta": dict(momenta),
                "weight_decay": weight_decay,
                "decay_component": decay_component,
                "decay_last": decay_last,
            },
        )

    @property
    def buckets(self) -> dict[str, tuple[str, ...]]:
        """Component names per bucket; each bucket has one buffer and needs one backward pass."""
        settings = self.param_groups[0]
        return bucket_components(settings["momenta"], {settings["decay_component"]} if settings["decay_last"] else ())

    @property
    def gradient_components(self) -> frozenset[str]:
        """Components for which `step` requires a gradient: all but "weight_decay"."""
        return super().gradient_components - {WEIGHT_DECAY}

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: dict[str, list[Tensor | None]]) -> None:
        settings, buckets = self.param_groups[0], self.buckets
        decay_bucket = next(b for b, members in buckets.items() if settings["decay_component"] in members)
        # The decay reads the parameters before the step if it goes first, and the moved ones if it goes last.
        for bucket in sorted(buckets, key=lambda b: (b == decay_bucket) == settings["decay_last"]):
            decay = group["weight_decay"] if bucket == decay_bucket else 0.0
            pairs = [(p, g) for p, g in zip(params, gradients[bucket], strict=True) if decay or g is not None]
            if not pairs:
                continue
            moved, grads = zip(*pairs, strict=True)
            buffers = self._buffers(moved, f"momentum_buffer.{bucket}")
            torch._foreach_mul_(buffers, settings["momenta"][buckets[bucket][0]])
            if fed := [(b, g) for b, g in zip(buffers, grads, strict=True) if g is not None]:
                torch._foreach_add_(*zip(*fed, strict=True))
            if decay:
                torch._foreach_add_(buffers, moved, alpha=decay)
            torch._foreach_add_(moved, buffers, alpha=-group["lr"])
