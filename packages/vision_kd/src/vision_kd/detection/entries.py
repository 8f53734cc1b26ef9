"""Entries of COCO annotation files: every value has its type from the moment it is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_common.errors import UserError
from vision_kd.data.base import UNPRINTABLE

LARGEST = 2**53
"""Largest id; larger ones are not distinct in float64, in which detections are recorded."""


def _whole(value: Any) -> int:
    number = int(value) if type(value) is float and value.is_integer() else value
    if type(number) is not int or abs(number) > LARGEST:
        raise TypeError
    return number


def _positive(value: Any) -> int:
    if (number := _whole(value)) < 1:
        raise ValueError
    return number


def _text(value: Any) -> str:
    if type(value) is not str or not value.strip() or UNPRINTABLE.search(value):
        raise TypeError
    return value


def _amount(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise TypeError
    return float(value)


def _box(value: Any) -> list[float]:
    left, top, wide, high = value
    if type(value) is not list or not {type(left), type(top)} <= {int, float} or not math.isfinite(left + top):
        raise TypeError
    return [float(left), float(top), _amount(wide), _amount(high)]


def _crowd(value: Any) -> int:
    if value is None:
        return 0
    if type(value) not in (int, float, bool) or value not in (0, 1):
        raise TypeError
    return int(value)


WHOLE, TEXT = "a whole number of at most 2^53", "text without control characters"
PIXELS = "a whole number of pixels"
FIELDS: dict[str, dict[str, tuple[Callable[[Any], Any], str]]] = {
    "images": {
        "id": (_whole, WHOLE),
        "width": (_positive, PIXELS),
        "height": (_positive, PIXELS),
        "file_name": (_text, TEXT),
    },
    "annotations": {
        "id": (_positive, "a whole number of at least 1"),  # pycocotools treats a match with id 0 as none
        "image_id": (_whole, WHOLE),
        "category_id": (_whole, WHOLE),
        "bbox": (_box, "[left, top, width, height], four finite numbers in pixels, the last two not negative"),
        "area": (lambda value: None if value is None else _amount(value), "a finite number that is not negative"),
        "iscrowd": (_crowd, "0 or 1"),
    },
    "categories": {"id": (_whole, WHOLE), "name": (_text, TEXT)},
}
"""Keys of the entries of each list, with a function that reads the value or fails, and the expected type."""


def read_entries(entries: list[Any], kind: str, path: Path) -> None:
    """Convert the values of the entries of one list to their types, in place.

    Args:
        entries: The entries as JSON holds them.
        kind: Name of the list.
        path: File that they are from.

    Raises:
        UserError: If an entry lacks a key, or has a value of another kind.
    """
    for place, entry in enumerate(entries):
        if type(entry) is not dict:
            raise UserError(f"{path}: entry {place} of {kind} is {_shown(entry)}, no object")
    for key, (read, expected) in FIELDS[kind].items():
        for place, entry in enumerate(entries):
            try:
                entry[key] = read(entry.get(key))
            except (TypeError, ValueError, OverflowError):
                what = f"has {key} {_shown(entry[key])}" if key in entry else f"lacks {key}"
                raise UserError(
                    f"{path}: entry {place} of {kind} (id {_shown(entry.get('id'))}) {what}: {expected} is needed"
                ) from None


def _shown(value: Any) -> str:
    """Return a value as JSON writes it, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
