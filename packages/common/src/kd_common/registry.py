"""Named collections with exact keys."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kd_common.errors import UserError

T = TypeVar("T")


class UnknownNameError(UserError):
    """Error for a name that no entry has."""


def suggest(name: str, names: Iterable[str]) -> str:
    """Suggest close matches of a misspelt name, compared without regard to case.

    Args:
        name: Name as written by the user.
        names: Existing names.

    Returns:
        "; did you mean a, b?" with at most three names, or the empty string when nothing is close.
    """
    by_lower = {known.lower(): known for known in names}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
    return f"; did you mean {', '.join(close)}?" if close else ""


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """Find the imported classes that can be chosen in place of a base class.

    Args:
        base: A class, itself among the result unless it is abstract.

    Returns:
        The classes by name in alphabetical order, without abstract ones and names that start with "_".
    """
    found = {} if inspect.isabstract(base) or base.__name__.startswith("_") else {base.__name__: base}
    for derived in base.__subclasses__():
        found |= subclasses(derived)
    return dict(sorted(found.items()))


class Registry(Generic[T]):
    """Table with exact keys that decorated classes and functions enter.

    Args:
        kind: Kind of the entries ("model", "method"), for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under a name and returns it unchanged.

        Args:
            name: The key, exactly as users will write it.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered")

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry under a name.

        Args:
            name: The key, matched exactly.

        Raises:
            UnknownNameError: If no entry has this name; the message lists close matches and all names.
        """
        if name not in self._entries:
            hint = suggest(name, self._entries)
            raise UnknownNameError(f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self.names())})")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all keys in the order of registration."""
        return tuple(self._entries)
