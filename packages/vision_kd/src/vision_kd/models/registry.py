"""Table of built-in networks, filled by the family modules of this package."""

from collections.abc import Callable

from torch import nn

from kd_common.registry import Registry

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
"""Builders called as `builder(num_classes=..., in_channels=..., **args)`."""
