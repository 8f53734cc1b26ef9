"""Drafters behind one interface; adding one touches one file, which enters its class in `DRAFTERS`."""

import importlib
import pkgutil

from spec_decode.drafters.base import Drafter, DraftState, DynamicTree
from spec_decode.drafters.files import DrafterSpec, load_drafter, save_drafter
from spec_decode.drafters.prompt_lookup import PromptLookup, WithLookup
from spec_decode.drafters.registry import DRAFTERS
from spec_decode.drafters.trainable import TrainableDrafter

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DRAFTERS",
    "DraftState",
    "Drafter",
    "DrafterSpec",
    "DynamicTree",
    "PromptLookup",
    "TrainableDrafter",
    "WithLookup",
    "load_drafter",
    "save_drafter",
]
