"""Responses that a teacher writes once: kept on disk, continued after an interruption."""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kd_common.errors import UserError
from kd_common.files import cache_root, checksummed_line, locked, naming, read_checksummed_line
from kd_common.hub.language_models import settings_with_effect
from llm_kd.models import vocabulary_size
from llm_kd.models.fingerprint import tensors_fingerprint
from llm_kd.models.generation import Sampling, generate, response_ends

CACHE_FORMAT = 2


class ResponsesError(UserError):
    """A file of responses that is not what was written; the message names it and says what to do."""


@dataclass(frozen=True)
class Response:
    """What a teacher answered.

    Attributes:
        tokens: Token ids, with the token that ended the response if one did.
        text: The same as text, without special tokens.
    """

    tokens: list[int]
    text: str


def write_responses(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
    pad_id: int,
    seed: int,
    batch_size: int,
    progress_bar: bool = True,
) -> list[Response]:
    """A teacher's responses to prompts, from the cache as far as they are there.

    They are kept in ``$KD_CACHE/responses`` (default ``~/.cache/kd/responses``), one JSON object a line, in a file
    named after model, sampling, seed and prompts. What other files answered alike is taken from there, so that the
    teacher answers new prompts only. A file is written batch by batch beside its final place; a run that was killed
    continues there and ends with the file that an uninterrupted run writes. Of several processes one writes, the others
    wait for it.

    Args:
        model: Teacher, as :func:`llm_kd.models.generation.generate` takes it.
        prompts: Token ids, at least one per prompt.
        sampling: How tokens are drawn.
        tokenizer: Gives the text, and the size of the vocabulary.
        eos_ids: Tokens that end a response.
        pad_id: Token that fills up the prompts of a batch.
        seed: Seed of the drawing.
        batch_size: Prompts per batch. This, and what was answered before, only changes which random numbers a prompt
            gets.
        progress_bar: Show one while writing.

    Returns:
        Responses in the order of the prompts.

    Raises:
        ResponsesError: If the cached file is damaged.
        ValueError: If a prompt is empty, or too long for the positions of the model.
    """
    vocab_size = vocabulary_size(tokenizer)
    path = responses_path(model, prompts, sampling, eos_ids=eos_ids, vocab_size=vocab_size, seed=seed)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    if not path.is_file():
        with locked(path, "the teacher's responses"):
            if not path.is_file():  # another process may have written it meanwhile
                partial = path.with_suffix(".partial")
                known = _answered_before(path, prompts, order)
                done = _resume(partial, order, batch_size)
                settings: dict[str, Any] = {"eos_ids": eos_ids, "pad_id": pad_id, "vocab_size": vocab_size}
                with (
                    naming(partial, "the responses before are complete; start again to go on from there"),
                    partial.open("ab") as file,
                    tqdm(total=len(order), initial=done, desc="teacher's responses", disable=not progress_bar) as bar,
                ):
                    for start in range(done, len(order), batch_size):
                        batch = order[start : start + batch_size]
                        asked = [number for number in batch if number not in known]
                        answers = generate(
                            model,
                            [prompts[number] for number in asked],
                            sampling,
                            seed=np.random.SeedSequence((seed, start)).generate_state(1).item(),
                            batch_size=batch_size,
                            **settings,
                        )
                        all_known = known | dict(zip(asked, answers, strict=True))
                        file.writelines(_line(n, prompts[n], all_known[n], tokenizer) for n in batch)
                        file.flush()
                        bar.update(len(batch))
                    os.fsync(file.fileno())
                partial.replace(path)
    found = _read(path.read_bytes(), order, path)
    if len(found) != len(prompts):
        raise ResponsesError(f"{path}: {len(found)} responses to {len(prompts)} prompts; delete it to write it again")
    texts = (str(tokenizer.decode(found[number], skip_special_tokens=True)) for number in range(len(prompts)))
    return [Response(found[number], text) for number, text in enumerate(texts)]


def responses_path(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    eos_ids: Collection[int],
    vocab_size: int,
    seed: int,
) -> Path:
    """File of a teacher's responses; its name holds a hash of what determines them, and one of the prompts."""
    content = {
        "format": CACHE_FORMAT,
        "weights": tensors_fingerprint(model.state_dict()),
        "config": settings_with_effect(model.config.to_dict()),
        "sampling": asdict(sampling),
        "eos_ids": response_ends(model, eos_ids),
        "vocab_size": vocab_size,
        "seed": seed,
    }
    name = Path(model.config.name_or_path).name or "model"
    return cache_root() / "responses" / f"{name}-{_digest(content)}-{_digest(list(prompts))}.jsonl"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _answered_before(path: Path, prompts: Sequence[list[int]], order: Sequence[int]) -> dict[int, list[int]]:
    """Tokens of responses in complete files beside one that differ in the prompts alone, by the prompt's number.

    A response is taken once, so that a prompt that occurs several times is answered as often.
    """
    alike, found = path.name.rpartition("-")[0], dict[str, list[list[int]]]()
    for other in sorted(path.parent.glob("*.jsonl")):
        if other.name.rpartition("-")[0] == alike:
            for record in _records(other.read_bytes(), other):
                found.setdefault(record["asked"], []).append(record["tokens"])
    return {n: same.pop(0) for n in order if (same := found.get(_digest(prompts[n])))}


def _line(number: int, prompt: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> bytes:
    # The text is for people: another tokenizer of the same ids may write it otherwise, so it is not read again.
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return checksummed_line({"prompt": number, "asked": _digest(prompt), "tokens": tokens, "text": text})


def _resume(partial: Path, order: Sequence[int], batch_size: int) -> int:
    """Cut what an interrupted run wrote down to whole batches, and return the number of responses left."""
    if not partial.is_file():
        return 0
    lines = partial.read_bytes().splitlines(keepends=True)
    complete = sum(line.endswith(b"\n") for line in lines)  # a kill tears at most the last one
    whole = complete if complete == len(order) else complete - complete % batch_size
    kept = b"".join(lines[:whole])
    _read(kept, order, partial)
    with partial.open("r+b") as file:
        file.truncate(len(kept))
    return whole


def _read(content: bytes, order: Sequence[int], path: Path) -> dict[int, list[int]]:
    """Tokens of responses by the number of their prompt; they stand in the order they were written in."""
    found = {}
    for line, record in enumerate(_records(content, path), 1):
        if line > len(order) or record["prompt"] != order[line - 1]:
            problem = f"answers prompt {record['prompt']} out of order"
            raise ResponsesError(f"{path}, line {line}: damaged ({problem}); delete it to write it again")
        found[record["prompt"]] = list(record["tokens"])
    return found


def _records(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The lines of a file of responses."""
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            records.append(read_checksummed_line(line))
            if missing := {"prompt", "asked", "tokens", "text"} - records[-1].keys():
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except ValueError as error:
            raise ResponsesError(f"{path}, line {number}: damaged ({error}); delete it to write it again") from error
    return records
