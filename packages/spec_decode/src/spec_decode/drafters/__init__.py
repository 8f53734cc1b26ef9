"""Drafters behind one interface; a new one is one file, and its class is chosen by its name."""

import importlib
import pkgutil

from spec_decode.drafters.base import DraftContext, Drafter, DynamicTree
from spec_decode.drafters.draft_model import DraftModel, PretrainedDraft
from spec_decode.drafters.eagle3 import Eagle3
from spec_decode.drafters.fast_eagle import FastEagle
from spec_decode.drafters.files import load_drafter, save_drafter
from spec_decode.drafters.medusa import Medusa
from spec_decode.drafters.prompt_lookup import PromptLookup, WithLookup
from spec_decode.drafters.trainable import TrainableDrafter

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DraftContext",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "Eagle3",
    "FastEagle",
    "Medusa",
    "PretrainedDraft",
    "PromptLookup",
    "TrainableDrafter",
    "WithLookup",
    "load_drafter",
    "save_drafter",
]
