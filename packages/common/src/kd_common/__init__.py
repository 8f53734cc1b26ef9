"""Shared building blocks of the distillation packages: maths, optimizers, gradients, CLI base."""

__version__ = "0.1.0"
