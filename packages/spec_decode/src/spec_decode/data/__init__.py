"""Prompts, the target's answers to them, and its features."""

from typing import TYPE_CHECKING, Any

from spec_decode.data.corpus import Sample, Writing
from spec_decode.data.features import FeatureStore

if TYPE_CHECKING:
    from spec_decode.data.datamodule import DraftBatch, TargetText

__all__ = ["DraftBatch", "FeatureStore", "Sample", "TargetText", "Writing"]


def __getattr__(name: str) -> Any:
    """What needs Lightning, whose import takes seconds; the commands that do not train go without."""
    if name in __all__:
        from spec_decode.data import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
