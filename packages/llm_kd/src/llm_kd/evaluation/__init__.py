"""Evaluation of a language model by its answers."""
