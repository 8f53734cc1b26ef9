"""FastEagle speculative decoding (no public functionality yet)."""

__version__ = "0.1.0"
