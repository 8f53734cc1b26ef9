"""Prompts for the target to answer: a packaged set made of templates and topics, or a file of one's own."""

import json
import random
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
    if not path.is_file():
        raise FileNotFoundError(f"prompts {path}: no such file; leave it out for the packaged prompts")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except (ValueError, KeyError, IndexError, TypeError, StopIteration, RecursionError) as error:
            raise ValueError(
                f"prompts {path}, line {number}: needs prompt, turns, instruction, question or messages"
            ) from error
    if not prompts:
        raise ValueError(f"prompts {path} holds no prompt")
    return prompts


def _prompt(record: dict) -> str:
    if "messages" in record:
        return next(m["content"] for m in record["messages"] if m["role"] == "user")
    if "turns" in record:
        return record["turns"][0]
    if "instruction" in record:
        return "\n\n".join(filter(None, (record["instruction"], record.get("input", ""))))
    return record["prompt"] if "prompt" in record else record["question"]
