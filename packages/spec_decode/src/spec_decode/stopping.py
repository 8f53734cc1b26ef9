"""Stop strings: a row ends as soon as its new text holds one."""

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Watches the new text of every row.

    Args:
        strings: Texts that end a row.
        tokenizer: transformers tokenizer that decodes tokens.
        batch: Number of rows.

    Raises:
        ValueError: Without a tokenizer, or for an empty string.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, batch: int) -> None:
        if tokenizer is None:
            raise ValueError("stop_strings need SpeculativeDecoder(..., tokenizer=...)")
        if not all(strings):
            raise ValueError("a stop string must not be empty")
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # Byte-level tokenizers may spend up to four tokens on a character.
        self.tail = 4 * max(map(len, strings)) + 4
        self.seen: list[list[int]] = [[] for _ in range(batch)]

    def cut(self, row: int, new: Sequence[int]) -> int | None:
        """Number of new tokens up to the one that completes a stop string, or None while there is none."""
        seen = self.seen[row]
        for count, token in enumerate(new, start=1):
            seen.append(token)
            text = self.tokenizer.decode(seen[-self.tail :])
            if any(string in text for string in self.strings):
                return count
        return None
