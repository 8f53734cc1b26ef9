"""How a language model is judged by its answers."""
