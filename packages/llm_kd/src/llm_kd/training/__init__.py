"""Training of students with Lightning."""
