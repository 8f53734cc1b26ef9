"""Stop strings: a row ends as soon as its new text holds one."""

from collections.abc import Sequence
from typing import Any

from kd_common.errors import UserError


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raise unless the value is a list of texts to stop at.

    Raises:
        UserError: For a single text, whose letters would count as one text each, or an empty one.
    """
    if isinstance(strings, str):
        raise UserError(f"stop_strings must be a list of texts, as in [{strings!r}], got {strings!r}")
    if not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"a stop string must not be empty, and be text, got {list(strings)}")


class StopStrings:
    """Watcher of the new text of every row.

    Args:
        strings: Texts that end a row.
        tokenizer: Transformers tokenizer that decodes tokens.
        batch: Number of rows.

    Raises:
        UserError: Without a tokenizer, or as in `check_stop_strings`.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, batch: int) -> None:
        if tokenizer is None:
            raise UserError("stop_strings need SpeculativeDecoder(..., tokenizer=...)")
        check_stop_strings(strings)
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # Byte-level tokenizers may spend up to four tokens on a character.
        self.tail = 4 * max(map(len, strings)) + 4
        self.seen: list[list[int]] = [[] for _ in range(batch)]

    def cut(self, row: int, new: Sequence[int]) -> int | None:
        """Return the number of new tokens up to the one that completes a stop string; None without a match."""
        seen = self.seen[row]
        for count, token in enumerate(new, start=1):
            seen.append(token)
            text = self.tokenizer.decode(seen[-self.tail :])
            if any(string in text for string in self.strings):
                return count
        return None
