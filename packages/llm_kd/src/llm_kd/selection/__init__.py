"""Token selectors, one file each; every module of this package is imported, so a new file is a new selector."""

import importlib
import pkgutil

from llm_kd.selection.base import Selection, Selector

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Selection", "Selector"]
