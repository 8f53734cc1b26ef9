"""Gradient policies, one file each: rules that turn the gradients of named loss components into one update.

A policy gives every component a momentum. The optimizers of `kd_common.optim` keep one buffer per distinct momentum,
and the training step runs one backward pass per buffer. `SGD` costs one pass, `DOT` two, `DeepKD` two
(`preset="paper"`) or three (`preset="released"`).

Every module of this package is imported, so a new file is a new policy.
"""

import importlib
import pkgutil

from vision_kd.policies.adamw import AdamW
from vision_kd.policies.base import GradientPolicy
from vision_kd.policies.deepkd import DeepKD
from vision_kd.policies.deepkd_adamw import DeepKDAdamW
from vision_kd.policies.dot import DOT
from vision_kd.policies.sgd import SGD

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DOT", "SGD", "AdamW", "DeepKD", "DeepKDAdamW", "GradientPolicy"]
