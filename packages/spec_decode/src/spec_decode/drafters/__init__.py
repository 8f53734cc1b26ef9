"""Drafters behind one interface; adding one touches one file, which enters its class in `DRAFTERS`."""

from spec_decode.drafters.base import Drafter, DraftState, DynamicTree
from spec_decode.drafters.prompt_lookup import PromptLookup, WithLookup
from spec_decode.drafters.registry import DRAFTERS

__all__ = ["DRAFTERS", "DraftState", "Drafter", "DynamicTree", "PromptLookup", "WithLookup"]
