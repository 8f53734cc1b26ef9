"""DeepKD for image classifiers: gradients split by component, one momentum each, dynamic top-k mask."""

__version__ = "0.1.0"
