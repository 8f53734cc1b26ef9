"""Checks, before anything is computed, that sequences fit the context length of the models that read them."""

import sys
from collections.abc import Mapping
from typing import Any

from kd_common.errors import UserError


def context_length(config: Any) -> int:
    """Return the largest number of tokens in a sequence of a model, by its configuration."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if found is None else found


def check_context_length(configs: Mapping[str, Any], tokens: int, what: str, hint: str) -> None:
    """Refuse sequences beyond a model's positions: learned ones end in an index error, others go on, silently worse.

    Args:
        configs: Configurations of the models that read the sequences, by what to call these.
        tokens: Length of the longest sequence.
        what: What the sequences are, for the message.
        hint: What to do, for the message.

    Raises:
        UserError: If a model has too few.
    """
    for name, config in configs.items():
        if tokens > (limit := context_length(config)):
            raise UserError(f"{what} of up to {tokens} tokens exceed the {name}'s {limit} positions; {hint}")
