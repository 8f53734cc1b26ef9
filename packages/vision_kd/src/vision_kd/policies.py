"""Gradient policies: how the gradients of named loss components become one update.

A policy gives every component a momentum. That is all it has to do: the optimizers of :mod:`kd_common.optim` keep one
buffer per distinct momentum and the training step runs one backward pass per buffer. ``SGD`` costs one pass, ``DOT``
two, ``DeepKD`` two (``preset="paper"``) or three (``preset="released"``).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from kd_common.optim import ComponentOptimizer, DecoupledAdamW, DecoupledSGD, deepkd_adamw, deepkd_sgd
from kd_common.optim.sgd import WEIGHT_DECAY

Delta = float | dict[str, float]

PARTS = ("task", "target", "nontarget")
# Relations between samples or classes and feature maps are dark knowledge: they move with the non-target component.
ALIASES = {"relation": "nontarget", "feature": "nontarget"}


class GradientPolicy(ABC):
    """Builds the optimizer that turns component gradients into updates of the student."""

    @abstractmethod
    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Optimizer over the student's parameters.

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


class SGD(GradientPolicy):
    """One momentum for all components: SGD on the summed loss, in one backward pass."""

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a :class:`DecoupledSGD` with one buffer; see :meth:`GradientPolicy.optimizer`."""
        return DecoupledSGD(student.parameters(), lr, dict.fromkeys(components, momentum), weight_decay)


class DOT(GradientPolicy):
    """Distillation-oriented trainer (ICCV 2023): task at mu - delta, all distillation terms at mu + delta.

    Weight decay is a component of its own at mu, so it acts as in the SGD baseline.

    Args:
        delta: Distance from mu; 0.075 on CIFAR-100 and 0.09 on ImageNet in the paper.
    """

    def __init__(self, delta: float = 0.075) -> None:
        self.delta = delta

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a :class:`DecoupledSGD` with two buffers and the decay's; see :meth:`GradientPolicy.optimizer`."""
        require_parts(self, components)
        momenta = dict.fromkeys(components, momentum + self.delta)
        momenta |= {"task": momentum - self.delta, WEIGHT_DECAY: momentum}
        return DecoupledSGD(student.parameters(), lr, momenta, weight_decay, decay_component=WEIGHT_DECAY)


class DeepKD(GradientPolicy):
    """Decoupled momentum of DeepKD (arXiv 2505.15133): task and non-target at mu + delta, target at mu - delta.

    Args:
        delta: Distance from mu, one number or ``{"task": .., "target": .., "nontarget": ..}``; 0.05 to 0.075 in the
            paper.
        preset: ``paper`` follows the text. ``released`` reproduces the published optimizer: the task buffer decays
            with the target's momentum and the weight decay is part of the target gradient.
        decay_component: Component that carries the weight decay; None for the preset's own, which under ``paper`` is
            one of its own at mu that acts exactly as in the SGD baseline (the text is silent).
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
        """Return the preset's :class:`DecoupledSGD`; see :meth:`GradientPolicy.optimizer`."""
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


class AdamW(GradientPolicy):
    """AdamW on the summed loss, in one backward pass, for transformer students.

    Biases, normalisation weights and what timm lists in ``no_weight_decay()`` are not decayed.

    Args:
        beta2: Decay of the second moment, in [0, 1).
    """

    def __init__(self, beta2: float = 0.999) -> None:
        self.beta2 = beta2

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a :class:`DecoupledAdamW` with one first moment; see :meth:`GradientPolicy.optimizer`."""
        groups = decay_matrices_only(student, weight_decay)
        return DecoupledAdamW(groups, lr, dict.fromkeys(components, momentum), self.beta2)


class DeepKDAdamW(GradientPolicy):
    """DeepKD's rule applied to beta1 of AdamW: mu + delta, mu - delta, mu + delta; two backward passes.

    Biases, normalisation weights and what timm lists in ``no_weight_decay()`` are not decayed.

    Args:
        delta: As in :class:`DeepKD`.
        beta2: Decay of the second moment, in [0, 1).
    """

    def __init__(self, delta: Delta = 0.075, beta2: float = 0.999) -> None:
        self.delta = delta
        self.beta2 = beta2

    def optimizer(
        self, student: nn.Module, components: Sequence[str], *, lr: float, momentum: float, weight_decay: float
    ) -> ComponentOptimizer:
        """Return a :class:`DecoupledAdamW` with two first moments; see :meth:`GradientPolicy.optimizer`."""
        return deepkd_adamw(
            decay_matrices_only(student, weight_decay),
            lr=lr,
            base_beta1=momentum,
            delta=self.delta,
            beta2=self.beta2,
            aliases=require_parts(self, components),
        )


def require_parts(policy: GradientPolicy, components: Sequence[str]) -> dict[str, str]:
    """Check for the three parts a decoupling policy treats apart.

    Returns:
        The momentum donor of each further component.

    Raises:
        ValueError: If a part is missing; the message names it and the remedy.
    """
    if missing := [name for name in PARTS if name not in components]:
        raise ValueError(
            f"model.policy {type(policy).__name__} treats the gradient of {', '.join(missing)} apart, which the method "
            f"does not have (it has: {', '.join(components)}); use model.policy SGD with it, or a distillation method"
        )
    extra = [name for name in components if name not in PARTS]
    if unknown := [name for name in extra if name not in ALIASES]:
        raise ValueError(f"components {unknown} have no momentum in vision_kd.policies; add them to ALIASES")
    return {name: ALIASES[name] for name in extra}


def decay_matrices_only(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay weight matrices and spare what transformers leave alone.

    Spared are parameters with fewer than two axes (biases, normalisation weights) and those a timm network lists in
    ``no_weight_decay()`` (class token, position embedding).
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
