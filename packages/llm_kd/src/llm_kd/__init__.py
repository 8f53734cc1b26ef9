"""Token-selective distillation of language models (SelecTKD): selection, selectors, objectives and the chunked head."""

__version__ = "0.1.0"
