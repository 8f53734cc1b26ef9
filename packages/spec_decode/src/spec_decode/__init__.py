"""FastEagle speculative decoding: draft trees, exact verification, noise keyed by position, cost model."""

__version__ = "0.1.0"
