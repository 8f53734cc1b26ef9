"""Prompts, the target's answers to them, and its features."""
