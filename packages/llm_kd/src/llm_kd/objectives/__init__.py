"""Per-token divergences, one file each; every module of this package is imported, so a new file is a new objective."""

import importlib
import pkgutil

from llm_kd.objectives.base import Objective

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Objective"]
