"""Safe printing of texts from users and models, because a terminal obeys control characters."""

import re

# All but tab and line ends, the eight-bit controls, marks of writing direction, and half surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")


def printable(text: str) -> str:
    r"""Return the text with control characters spelled out, such as `\x1b` for escape; tabs and ends of lines stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
