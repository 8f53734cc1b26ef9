"""Token-selective distillation of language models (no public functionality yet)."""

__version__ = "0.1.0"
