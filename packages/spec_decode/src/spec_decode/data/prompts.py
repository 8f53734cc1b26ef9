"""Prompts for the target to answer: a packaged set made of templates and topics, or a file of one's own."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from spec_decode.data.topics import TEMPLATES, TOPICS


def packaged_prompts() -> list[str]:
    """All templates with all topics, in a fixed random order."""
    prompts = [template.format(topic=topic) for template in TEMPLATES for topic in TOPICS]
    random.Random(0).shuffle(prompts)
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSONL file whose lines hold "prompt", or a conversation whose first user turn is taken.

    Accepted are ``{"prompt": ...}``, ``{"turns": [...]}``, ``{"instruction": ..., "input": ...}``,
    ``{"question": ...}`` and ``{"messages": [{"role": "user", "content": ...}, ...]}``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a line that is none of these, or a file without lines.
    """
    return _read(path, _prompt, "prompt, turns, instruction, question or messages")


def read_answers(path: Path) -> list[str]:
    """Answers beside the prompts of such a file.

    That is ``answer``, ``response``, ``output``, or the assistant's message behind the first user turn.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a line without one, or a file without lines.
    """
    return _read(path, _answer, "for data.answers file an answer, response, output or assistant message")


def _read(path: Path, parse: Callable[[dict], str], what: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts {path}: no such file; leave it out for the packaged prompts")
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = parse(json.loads(line))
            if not isinstance(text, str) or not text:
                raise TypeError
            texts.append(text)
        except (ValueError, KeyError, IndexError, TypeError, StopIteration, RecursionError) as error:
            raise ValueError(f"prompts {path}, line {number}: needs {what}") from error
    if not texts:
        raise ValueError(f"prompts {path} holds no prompt")
    return texts


def _prompt(record: dict) -> str:
    if "messages" in record:
        return next(m["content"] for m in record["messages"] if m["role"] == "user")
    if "turns" in record:
        return record["turns"][0]
    if "instruction" in record:
        return "\n\n".join(filter(None, (record["instruction"], record.get("input", ""))))
    return record["prompt"] if "prompt" in record else record["question"]


def _answer(record: dict) -> str:
    if "messages" in record:
        turns = iter(record["messages"])
        next(m for m in turns if m["role"] == "user")  # the prompt; what stands before it answers something else
        return next(m["content"] for m in turns if m["role"] == "assistant")
    return next(record[key] for key in ("answer", "response", "output") if key in record)
