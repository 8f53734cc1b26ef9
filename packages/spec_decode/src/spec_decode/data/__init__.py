"""Prompts, the target's answers to them, and its features."""

from spec_decode.data.corpus import Sample, Writing
from spec_decode.data.datamodule import DraftBatch, TargetText
from spec_decode.data.features import FeatureStore

__all__ = ["DraftBatch", "FeatureStore", "Sample", "TargetText", "Writing"]
