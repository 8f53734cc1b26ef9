"""Distillation methods, one file each; every module of this package is imported, so a new file is a new method."""

import importlib
import pkgutil

from vision_kd.methods.base import Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def available_methods() -> dict[str, type[Method]]:
    """Every imported method class by the name the command line knows it under."""
    return {cls.__name__: cls for cls in sorted(Method.__subclasses__(), key=lambda cls: cls.__name__)}


__all__ = ["Method", "available_methods"]
