"""Optimizers with one first-moment coefficient per gradient component."""

from kd_common.optim.adamw import DecoupledAdamW
from kd_common.optim.base import ComponentOptimizer
from kd_common.optim.deepkd import deepkd_adamw, deepkd_momenta, deepkd_sgd
from kd_common.optim.groups import decay_groups
from kd_common.optim.sgd import DecoupledSGD

__all__ = [
    "ComponentOptimizer",
    "DecoupledAdamW",
    "DecoupledSGD",
    "decay_groups",
    "deepkd_adamw",
    "deepkd_momenta",
    "deepkd_sgd",
]
