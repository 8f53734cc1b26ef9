"""Records of data files with their places; all errors are counted and named."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kd_common.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

SHOWN_PROBLEMS = 5
FORMATS = "data files end in .jsonl (one JSON object a line) or .parquet"
MARKS = {
    b"\x1f\x8b": "is no JSON but compressed (gzip); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\xff\xfe": "is not JSON in UTF-8 but UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is not JSON in UTF-8 but UTF-16 text; save it as UTF-8",
    b"PAR1": "is a Parquet file; let its name end in .parquet",
}
"""Kinds of binary files by their first bytes."""


class RowsError(UserError):
    """A data file cannot be read or holds malformed rows; the message names file and lines."""


class MalformedError(ValueError):
    """Report of one wrong record."""


class EncodingError(UserError):
    """A row or a template cannot be turned into tokens with a loss; the message names the row."""


def read_records(path: Path, parse: Callable[[Any, str], Sequence[T]]) -> list[T]:
    """Apply a function to every record of a JSONL or Parquet file.

    Blank lines hold no record and are skipped.

    Args:
        path: File ending in .jsonl or .parquet.
        parse: Takes a record and its source, `file, line 3`; raises `MalformedError`.

    Returns:
        All that it makes, in the order of the file; at least one.

    Raises:
        UserError: If there is no such file.
        RowsError: If the file is not of that format, holds no records, or holds malformed ones.
    """
    if path.is_dir():
        raise RowsError(f"{path} is a folder; name a file in it ({FORMATS})")
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    found: list[T] = []
    problems, count = [], 0
    for place, record in _records(path):
        count += 1
        try:
            if isinstance(record, MalformedError):
                raise record
            if not isinstance(record, dict):
                raise MalformedError(f"must be a JSON object, is {kind(record)}")
            found += parse(record, f"{path}, {place}")
        except MalformedError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        listed = list_problems(problems)
        raise RowsError(f"{path}: {len(problems)} of {count} rows are malformed; correct or remove them:\n{listed}")
    if not found:
        raise RowsError(f"{path}: holds no rows")
    return found


def encode_each(rows: Sequence[S], encode: Callable[[S], T]) -> list[T]:
    """Apply a function to every row, or to every row with its companion.

    Raises:
        EncodingError: For all rejected rows; the message counts them and shows the first.
    """
    found, problems = [], []
    for row in rows:
        try:
            found.append(encode(row))
        except EncodingError as problem:
            problems.append(str(problem))
    if len(problems) == 1:
        raise EncodingError(problems[0])
    if problems:
        raise EncodingError(f"{len(problems)} of {len(rows)} rows cannot be encoded:\n{list_problems(problems)}")
    return found


def list_problems(problems: Sequence[str]) -> str:
    """Return the first of some problems, a line each, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return "\n".join(f"  {line}" for line in [*problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])


def check_text(value: Any, what: str) -> str:
    """Return a value that must be text; none at all is empty text.

    Raises:
        MalformedError: If it is no text, or holds half a surrogate pair.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedError(f"{what} must be text, is {kind(value)}")
    if problem := broken_text(value):
        raise MalformedError(f"{what} {problem}")
    return value


def broken_text(text: str) -> str | None:
    """Return the error about half a surrogate pair, which cannot be written as UTF-8; None for a sound text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        return f"holds half of a character ({half}, a lone surrogate, at place {error.start}); remove or complete it"
    return None


def kind(value: Any) -> str:
    """Describe the type of a value."""
    names = {list: "a list", dict: "an object", bool: "a boolean", type(None): "null", bytes: "binary data (bytes)"}
    names |= {int: "a number", float: "a number", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Return the place and content of every record; a line that is not JSON arrives as the error it raised."""
    with path.open("rb") as file:
        start = file.read(4)
        if path.suffix == ".parquet":
            yield from ((f"row {number}", record) for number, record in enumerate(_parquet(path), 1))
        elif reason := next((reason for mark, reason in MARKS.items() if start.startswith(mark)), None):
            raise RowsError(f"{path} {reason}")
        elif path.suffix != ".jsonl":
            raise RowsError(f"{path}: {FORMATS}")
        else:
            file.seek(0)
            yield from ((f"line {number}", _parsed(line)) for number, line in enumerate(file, 1) if line.strip())


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return [
            {key: _present(value) for key, value in record.items()}
            for record in pyarrow.parquet.read_table(path).to_pylist()
        ]
    # A damaged page raises an OSError, damaged text within a page a ValueError.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RowsError(f"{path}: not a readable Parquet file ({error})") from error


def _present(value: Any) -> Any:
    """Return a value without the empty keys that Parquet gives an object which other rows have more keys in."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except MalformedError as problem:
        return problem
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        hint = " (one object over several lines? Write one a line)" if line.strip() in (b"[", b"{") else ""
        hint = " (it holds NUL bytes: if it is UTF-16, save it as UTF-8)" if b"\0" in line else hint
        return MalformedError(f"is not JSON: {error}{hint}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which no key may stand twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise MalformedError(f"holds the key {twice!r} twice")
    return found
