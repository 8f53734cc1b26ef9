"""AdamW with one beta1 per gradient component."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kd_common.checks import at_least, within
from kd_common.grads import sum_gradients
from kd_common.optim.base import ComponentOptimizer


class DecoupledAdamW(ComponentOptimizer):
    """AdamW with a first moment and a beta1 per component, and one second moment of the summed gradient.

    One step computes `m_c <- b_c m_c + (1 - b_c) g_c` and `v <- beta2 v + (1 - beta2) (sum_c g_c)^2`, then `theta <- (1
    - lr wd) theta - lr sum_c mhat_c / (sqrt(vhat) + eps)`. Every moment has its own bias correction, which counts the
    steps with a gradient. With equal beta1 it equals `torch.optim.AdamW` on the summed gradient. A step costs one
    backward pass and one buffer per distinct beta1, plus one buffer.

    Args:
        params: Parameters or parameter groups with their own lr and weight_decay.
        lr: Learning rate, >= 0.
        beta1s: Decay of the first moment per component, in [0, 1); shared by all groups.
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the square root of the second moment, >= 0.
        weight_decay: Decoupled weight decay, >= 0.

    Raises:
        UserError: If a setting is out of range.

    References:
        DeepKD's decoupled momentum (arXiv 2505.15133) applied to AdamW (arXiv 1711.05101).
    """

    coefficient = "beta1s"
    shared = ("beta1s",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        beta1s: Mapping[str, float],
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        within("beta2", beta2, "[0, 1)")
        at_least("eps", eps, 0)
        super().__init__(
            params, {"lr": lr, "beta1s": dict(beta1s), "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        )

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: dict[str, list[Tensor | None]]) -> None:
        lr, beta2, beta1s = group["lr"], group["beta2"], self.param_groups[0]["beta1s"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        total = [grad for grad in sum_gradients(list(gradients.values())) if grad is not None]
        squares = self._buffers(params, "exp_avg_sq")
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, total, total, 1 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, [math.sqrt(1 - beta2**step) for step in self._advance(params, "step")])
        torch._foreach_add_(scale, group["eps"])
        for bucket, members in self.buckets.items():
            reached = [(p, g, s) for p, g, s in zip(params, gradients[bucket], scale, strict=True) if g is not None]
            if not reached:
                continue
            moved, grads, scales = zip(*reached, strict=True)
            beta1 = beta1s[members[0]]
            means = self._buffers(moved, f"exp_avg.{bucket}")
            torch._foreach_lerp_(means, grads, 1 - beta1)
            sizes = [-lr / (1 - beta1**step) for step in self._advance(moved, f"step.{bucket}")]
            torch._foreach_addcdiv_(moved, means, scales, sizes)

    def _advance(self, params: Sequence[Tensor], key: str) -> list[int]:
        """Return the step counts after this step; plain integers, as loading casts tensors to the parameter's dtype."""
        for param in params:
            self.state[param][key] = self.state[param].get(key, 0) + 1
        return [self.state[param][key] for param in params]
