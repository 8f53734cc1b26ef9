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

REASONS, CUT = ("finish_reason", "stop_reason"), ("length", "max_tokens")


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
    """Return all templates with all topics, in a fixed random order."""
    prompts = [template.format(topic=topic) for template in TEMPLATES for topic in TOPICS]
    random.Random(0).shuffle(prompts)
    return prompts


def read_prompts(path: Path) -> list[Row]:
    """Prompts of a file; see `read_asked`."""
    return [asked.prompt for asked in read_asked(path)]


def read_asked(path: Path, *, answered: bool = False) -> list[Asked]:
    """Prompts of a JSONL or Parquet file, with the answers beside them.

    Records are those of `kd_common.text.read_rows`. A conversation is asked up to its first answer.
    `output_token_ids` holds an answer's tokens; `finish_reason` or `stop_reason` says with `length` or
    `max_tokens` that it was cut.

    Args:
        path: The file.
        answered: Refuse rows without an answer.

    Raises:
        UserError: If there is no such file, or for rows that are none of these, or a file without rows; the message
            counts them.
    """
    if not path.is_file() and not path.is_dir():
        raise UserError(f"prompts {path}: no such file; leave it out for the packaged prompts")

    def parse(record: Mapping[str, Any], source: str) -> list[Asked]:
        found = [_asked(row, record) for row in conversations(record, source, {})]
        if answered and any(asked.answer is None for asked in found):
            raise MalformedError(
                "needs for data.answers file an answer, response, output, completion or assistant message"
            )
        return found

    return read_records(path, parse)


def _asked(row: Row, record: Mapping[str, Any]) -> Asked:
    """Return a conversation cut at its first answer that may be learnt from."""
    tokens, cut = record.get("output_token_ids"), any(record.get(key) in CUT for key in REASONS)
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise MalformedError("output_token_ids must be a list of token ids, at least one")
        tokens = tuple(tokens)
    later = 0 if record.get("messages") or not isinstance(record.get("turns"), list) else len(record["turns"]) - 1
    places = [place for place, message in enumerate(row.messages) if message.role == "assistant" and message.learnt]
    if not places:
        answer = None if tokens is None else Answer(Message("assistant", ""), tokens, cut)
        return Asked(row, answer, later)
    later += len(row.messages) - places[0] - 1
    if tokens is not None and later:
        raise MalformedError("output_token_ids belong to one answer, but the conversation goes on behind its first")
    prompt = replace(row, messages=row.messages[: places[0]])
    return Asked(prompt, Answer(row.messages[places[0]], tokens, cut), later)
