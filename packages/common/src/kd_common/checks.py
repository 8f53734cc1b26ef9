"""Checks of settings in one line each; every message names the setting, its value and what is allowed."""

import math
from collections.abc import Collection
from typing import Any

from kd_common.errors import UserError


def positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite.

    Args:
        name: The setting, as a configuration names it.
        value: Its value.

    Raises:
        UserError: If it is.
    """
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be > 0 and finite, got {value}")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below a bound, and one that is not finite.

    Args:
        name: The setting, as a configuration names it.
        value: Its value.
        least: The smallest allowed.

    Raises:
        UserError: If it is.
    """
    if not least <= value < math.inf:
        raise UserError(f"{name} must be >= {least} and finite, got {value}")


def within(name: str, value: float, interval: str) -> None:
    """Refuse a number outside of an interval.

    Args:
        name: The setting, as a configuration names it.
        value: Its value.
        interval: Both ends as in mathematics, such as `"[0, 1)"` without 1.

    Raises:
        UserError: If it is outside.
    """
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise UserError(f"{name} must lie in {interval}, got {value}")


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is none of the known ones.

    Args:
        name: The setting, as a configuration names it.
        value: Its value.
        choices: The known ones.

    Raises:
        UserError: If it is another.
    """
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
