"""Interface of the gradient policies, and their shared functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_common.errors import UserError
from kd_common.optim import ComponentOptimizer
from kd_common.optim.deepkd import COMPONENTS

Delta = float | dict[str, float]

# Relations between samples or classes and feature maps are dark knowledge: they move with the non-target component.
ALIASES = {"relation": "nontarget", "feature": "nontarget"}


class GradientPolicy(ABC):
    """Base class of policies, which build the optimizer that turns component gradients into updates."""

    @abstractmethod
    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return the optimizer over the student's parameters.

        Args:
            student: Network to train.
            components: Names of the components the method returns.
            lr: Learning rate at schedule factor 1, > 0.
            momentum: Momentum mu (beta1 of Adam) around which the components are placed, in [0, 1).
            weight_decay: Decay coefficient, >= 0.

        Raises:
            ValueError: If the policy treats a component apart that the method does not return, or a momentum leaves
                [0, 1).
        """


def require_parts(policy: GradientPolicy, components: Sequence[str]) -> dict[str, str]:
    """Check for the three components that a decoupling policy treats separately.

    Returns:
        The momentum donor of each further component.

    Raises:
        ValueError: If a part is missing; the message names it and the hint.
    """
    if missing := [name for name in COMPONENTS if name not in components]:
        raise UserError(
            f"model.policy {type(policy).__name__} treats the gradient of {', '.join(missing)} apart, which the method "
            f"does not have (it has: {', '.join(components)}); use model.policy SGD with it, or a distillation method"
        )
    extra = [name for name in components if name not in COMPONENTS]
    if unknown := [name for name in extra if name not in ALIASES]:
        raise ValueError(f"components {unknown} have no momentum in vision_kd.policies.base; add them to ALIASES")
    return {name: ALIASES[name] for name in extra}


def decay_matrices_only(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups that decay weight matrices, but no biases, norms or embeddings of transformers.

    Parameters with fewer than two axes (biases, normalisation weights) are exempt, and so are those that a timm network
    lists in `no_weight_decay()` (class token, position embedding).
    """
    spared = {
        id(parameter)
        for module in student.modules()
        if callable(listed := getattr(module, "no_weight_decay", None))
        for name, parameter in module.named_parameters()
        if name in listed()
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in student.parameters():
        groups[parameter.ndim > 1 and id(parameter) not in spared].append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, params in groups.items()
        if params
    ]
