"""Whether models have positions for what they are to read, asked before anything is computed."""

import sys
from collections.abc import Mapping
from typing import Any


def positions(config: Any) -> int:
    """Largest number of tokens of a sequence that a model has positions for, by its configuration."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if found is None else found


def check_positions(configs: Mapping[str, Any], tokens: int, what: str, hint: str) -> None:
    """Refuse sequences beyond a model's positions: learned ones end in an index error, others go on, silently worse.

    Args:
        configs: Configurations of the models that read the sequences, by what to call these.
        tokens: Length of the longest sequence.
        what: What the sequences are, for the message.
        hint: What to do, for the message.

    Raises:
        ValueError: If a model has too few.
    """
    for name, config in configs.items():
        if tokens > (room := positions(config)):
            raise ValueError(f"{what} of up to {tokens} tokens exceed the {name}'s {room} positions; {hint}")
