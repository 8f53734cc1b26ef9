"""Distillation methods, one file each; every module of this package is imported, so a new file is a new method."""

import importlib
import pkgutil

from vision_kd.methods.base import Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method"]
