"""Rows of chat and instruction files, checked as a whole before anything is computed from them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ROLES = ("system", "user", "assistant")
FIELDS = ("messages", "instruction", "input", "output", "instances")
SHOWN_PROBLEMS = 5


class RowsError(ValueError):
    """A data file that cannot be read, or holds malformed rows; the message names file and lines."""


class _MalformedError(ValueError):
    """What is wrong with one record."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: The text.
        input: Material that a user's instruction refers to, kept apart because some layouts head it separately.
    """

    role: str
    content: str
    input: str = ""


@dataclass(frozen=True)
class Row:
    """A conversation and where it was read: ``file, line 3``.

    Attributes:
        messages: Its turns.
        source: File and line.
        alternatives: Further answers to its last question. The loss never falls on them; they are references that
            generations are compared with.
    """

    messages: tuple[Message, ...]
    source: str
    alternatives: tuple[str, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether the conversation ends with an answer; else it is a prompt."""
        return self.messages[-1].role == "assistant"


def read_rows(path: Path, fields: Mapping[str, str] | None = None) -> list[Row]:
    """Read conversations from JSONL or Parquet.

    A record is one of these, the first that fits:

    * ``messages``: a list of ``{role, content}``; it may end with a user's turn, and is then a prompt.
    * ``instruction``, and optionally ``input`` and ``output``; without an output it is a prompt. An output may be a
      list of answers: the first is the one to learn from, all are references.
    * ``instruction`` and ``instances``, a list of ``{input, output}``: one row per instance.

    Args:
        path: File ending in .jsonl or .parquet.
        fields: The file's own names of these fields, such as ``{"instruction": "question", "output": "answer"}``;
            every record must have a field named here. Other fields of a record are ignored.

    Returns:
        Rows in the order of the file, at least one.

    Raises:
        FileNotFoundError: If there is no such file.
        RowsError: If the file is not of that format, is empty, or holds malformed rows.
        ValueError: If ``fields`` names something unknown.
    """
    fields = dict(fields or {})
    if unknown := set(fields) - set(FIELDS):
        raise ValueError(f"fields may name {', '.join(FIELDS)}; got {', '.join(sorted(unknown))}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    rows, problems, count = [], [], 0
    for place, record in _records(path):
        count += 1
        try:
            source = f"{path}, {place}"
            rows += [Row(turns, source, alternatives) for turns, alternatives in _conversations(record, fields)]
        except _MalformedError as problem:
            problems.append(f"  {place}: {problem}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        listed = "\n".join(problems[:SHOWN_PROBLEMS] + ([f"  and {more} more"] if more > 0 else []))
        raise RowsError(f"{path}: {len(problems)} of {count} rows are malformed; correct or remove them:\n{listed}")
    if not rows:
        raise RowsError(f"{path}: holds no rows")
    return rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every record; a line that is not JSON arrives as the error it raised."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield f"line {number}", _parsed(line)
    elif path.suffix == ".parquet":
        try:
            records = pyarrow.parquet.read_table(path).to_pylist()
        # A damaged page is an OSError, damaged text within a page a ValueError.
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise RowsError(f"{path}: not a readable Parquet file ({error})") from error
        for number, record in enumerate(records, 1):
            yield f"row {number}", record
    else:
        raise RowsError(f"{path}: data files end in .jsonl (one JSON object a line) or .parquet")


def _parsed(line: bytes) -> Any:
    if not line.strip():
        return _MalformedError("is empty")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        return _MalformedError(f"is not JSON: {error}")


def _conversations(record: Any, fields: Mapping[str, str]) -> list[tuple[tuple[Message, ...], tuple[str, ...]]]:
    """The conversations of a record, one but for several instances, each with its further answers."""
    if isinstance(record, _MalformedError):
        raise record
    if not isinstance(record, dict):
        raise _MalformedError(f"must be a JSON object, is {_kind(record)}")
    if (turns := _field(record, "messages", fields)) is not None:
        return [(_chat(turns), ())]
    if (instruction := _field(record, "instruction", fields)) is None:
        raise _MalformedError(
            f"has neither messages nor instruction, but {', '.join(record) or 'nothing'}; name the file's own fields "
            "with `fields`, such as {instruction: question, output: answer}"
        )
    instances = _field(record, "instances", fields)
    if instances is None:
        instances = [record]
    elif not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise _MalformedError("instances must be a list of objects, at least one")
    return [
        _instruction(instruction, _field(instance, "input", fields), _field(instance, "output", fields))
        for instance in instances
    ]


def _field(record: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> Any:
    """A record's value under the file's own name of a field; None where it has none."""
    if name in fields and fields[name] not in record:
        raise _MalformedError(f"has no {fields[name]!r}, which `fields` gives for {name}")
    return record.get(fields.get(name, name))


def _chat(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _MalformedError("messages must be a list of turns, at least one")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            role = turn.get("role") if isinstance(turn, dict) else turn
            raise _MalformedError(f"turn {number} must have a role of {', '.join(ROLES)}, got {role!r}")
        if turn["role"] == "system" and messages:
            raise _MalformedError(f"turn {number}: a system turn can only come first")
        content = _text(turn.get("content"), f"the content of turn {number}")
        if not content.strip():
            raise _MalformedError(f"turn {number} is empty")
        messages.append(Message(turn["role"], content))
    asked = [message.role for message in messages if message.role != "system"]
    if not asked or asked[0] == "assistant":
        raise _MalformedError("a conversation must start with a user's turn, after the system's if there is one")
    return tuple(messages)


def _instruction(instruction: Any, material: Any, output: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    instruction, material = _text(instruction, "instruction"), _text(material, "input")
    if not instruction.strip():
        raise _MalformedError("instruction is empty")
    question = Message("user", instruction, material if material.strip() else "")
    if not isinstance(output, list):
        answer = _text(output, "output")
        return ((question, Message("assistant", answer)) if answer.strip() else (question,)), ()
    answers = [_text(value, f"output {number}") for number, value in enumerate(output, 1)]
    if not answers or not all(answer.strip() for answer in answers):
        raise _MalformedError("a list of outputs must hold at least one answer, and no empty one")
    return (question, Message("assistant", answers[0])), tuple(answers[1:])


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _MalformedError(f"{what} must be text, is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
