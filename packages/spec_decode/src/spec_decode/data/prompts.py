"""Prompts for the target to answer: a packaged set made of templates and topics, or a file of one's own."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_common.errors import UserError
from kd_common.text import Message, Row
from kd_common.text.records import MalformedError, read_records
from kd_common.text.rows import conversations
from spec_decode.data.topics import TEMPLATES, TOPICS

ASKED = ("instruction", "prompt", "question")
ANSWERED = ("answer", "response", "output", "completion")
REASONS, CUT = ("finish_reason", "stop_reason"), ("length", "max_tokens")
CHATS = ("messages", "conversations")


@dataclass(frozen=True)
class Answer:
    """An answer that stands in a file beside its prompt.

    Attributes:
        message: The assistant's turn.
        tokens: The tokens that the target drew, as its server wrote them; None where the file holds text alone.
        cut: Whether a limit on its length ended it, so that nothing closes it.
    """

    message: Message
    tokens: tuple[int, ...] | None = None
    cut: bool = False


@dataclass(frozen=True)
class Asked:
    """A conversation up to its first answer, and that.

    Attributes:
        prompt: What is asked: the turns before the answer, the system's among them.
        answer: The answer in the file, if there is one.
        later: Number of turns behind it, which are left out.
    """

    prompt: Row
    answer: Answer | None
    later: int


def packaged_prompts() -> list[str]:
    """All templates with all topics, in a fixed random order."""
    prompts = [template.format(topic=topic) for template in TEMPLATES for topic in TOPICS]
    random.Random(0).shuffle(prompts)
    return prompts


def read_prompts(path: Path) -> list[Row]:
    """Prompts of a file; see :func:`read_asked`."""
    return [asked.prompt for asked in read_asked(path)]


def read_answers(path: Path) -> list[Answer]:
    """Answers beside the prompts of a file; see :func:`read_asked`.

    Raises:
        UserError: If there is no such file.
        UserError: For rows without one.
    """
    return [asked.answer for asked in read_asked(path, answered=True) if asked.answer is not None]


def read_asked(path: Path, *, answered: bool = False) -> list[Asked]:
    """Prompts of a JSONL or Parquet file, with the answers beside them.

    A record holds ``messages`` or ``conversations`` (ShareGPT) as :func:`kd_common.text.read_rows` reads them; or
    ``turns`` (MT-bench) or ``data`` (UltraChat), a list of texts; or ``prompt``, ``instruction`` (with ``input``) or
    ``question``, with the answer as ``answer``, ``response``, ``output`` or ``completion``. A conversation is asked up
    to its first answer. ``output_token_ids`` holds an answer's tokens; ``finish_reason`` or ``stop_reason`` says with
    ``length`` or ``max_tokens`` that it was cut.

    Args:
        path: The file.
        answered: Refuse rows without an answer.

    Raises:
        UserError: If there is no such file.
        UserError: For rows that are none of these, or a file without rows; the message counts them.
    """
    if not path.is_file() and not path.is_dir():
        raise UserError(f"prompts {path}: no such file; leave it out for the packaged prompts")

    def parse(record: Mapping[str, Any], source: str) -> list[Asked]:
        found = [_asked(row, later, record) for row, later in _rows(record, source)]
        if answered and any(asked.answer is None for asked in found):
            raise MalformedError(
                "needs for data.answers file an answer, response, output, completion or assistant message"
            )
        return found

    return read_records(path, parse)


def _rows(record: Mapping[str, Any], source: str) -> list[tuple[Row, int]]:
    """The conversations of a record, each with the number of turns that were left out behind it."""
    later = 0
    if isinstance(record.get("turns"), list) and record["turns"]:
        record, later = {**record, "messages": [_said("user", record["turns"][0])]}, len(record["turns"]) - 1
    elif isinstance(record.get("prompt"), list):
        record = {"messages": record["prompt"], **record}
    elif isinstance(record.get("data"), list):
        turns = [_said(("user", "assistant")[n % 2], text) for n, text in enumerate(record["data"])]
        record = {"messages": turns, **record}
    output = next((name for name in ANSWERED if record.get(name) is not None), None)
    if any(record.get(key) for key in CHATS):
        [row] = conversations(record, source, {"output": output} if output else {})
        return [(row, later)]
    name = next((name for name in ASKED if record.get(name) is not None), None)
    if name is None:
        raise MalformedError(
            f"needs prompt, instruction, question, turns, data, messages or conversations; has {', '.join(record)}"
        )
    rows = conversations(record, source, {"instruction": name} | ({"output": output} if output else {}))
    return [(row, later) for row in rows]


def _said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _asked(row: Row, later: int, record: Mapping[str, Any]) -> Asked:
    """A conversation cut at its first answer that may be learnt from."""
    tokens, cut = record.get("output_token_ids"), any(record.get(key) in CUT for key in REASONS)
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise MalformedError("output_token_ids must be a list of token ids, at least one")
        tokens = tuple(tokens)
    places = [place for place, message in enumerate(row.messages) if message.role == "assistant" and message.learnt]
    if not places:
        answer = None if tokens is None else Answer(Message("assistant", ""), tokens, cut)
        return Asked(row, answer, later)
    later += len(row.messages) - places[0] - 1
    if tokens is not None and later:
        raise MalformedError("output_token_ids belong to one answer, but the conversation goes on behind its first")
    prompt = replace(row, messages=row.messages[: places[0]])
    return Asked(prompt, Answer(row.messages[places[0]], tokens, cut), later)
