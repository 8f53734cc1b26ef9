"""Drafting, verification and the decoder that joins them."""
