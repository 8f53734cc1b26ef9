"""Training of drafters with Lightning."""
