"""Training of students and teachers with Lightning."""
