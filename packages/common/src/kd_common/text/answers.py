"""Answers that a model writes once: kept on disk, continued after an interruption."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.files import checksummed_line, locked, naming, read_checksummed_line

WriteBatch = Callable[[list[list[int]], int], Sequence[Sequence[int]]]
"""Answers to some prompts of one batch, given them and the number of answers before the batch."""


@dataclass(frozen=True)
class AnswerCache:
    """Answers to prompts in a file with one line of JSON each, the longest prompt's first.

    The file's name holds digests of the prompts and of what else determines the answers, so that changed settings never
    meet old answers. It is written batch by batch beside its final place; a run that was killed continues there and
    ends with the file that an uninterrupted run writes. Of several processes one writes, the others wait for it.

    Args:
        folder: Where the file lies.
        name: How its name begins.
        settings: What determines the answers besides the prompts.
        prompts: Token ids.
        batch_size: Prompts that are answered at once.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    prompts: Sequence[Sequence[int]]
    batch_size: int

    @cached_property
    def path(self) -> Path:
        """Return the file."""
        return self.folder / f"{self._alike}-{_digest(list(map(list, self.prompts)))}.jsonl"

    @cached_property
    def _alike(self) -> str:
        """Return the common beginning of the names of all files that differ in the prompts alone."""
        return f"{self.name}-{_digest(dict(self.settings))}"

    @cached_property
    def _order(self) -> list[int]:
        """Numbers of the prompts as they are written: those of a batch are about equally long."""
        return sorted(range(len(self.prompts)), key=lambda number: len(self.prompts[number]), reverse=True)

    def read(self) -> list[list[int]] | None:
        """Return the answers in the order of the prompts; None unless all are there.

        Raises:
            UserError: If the file is damaged.
        """
        if not self.path.is_file():
            return None
        found = self._answers(self.path.read_bytes(), self.path)
        if len(found) != len(self.prompts):
            raise UserError(f"{self.path}: {len(found)} answers to {len(self.prompts)} prompts; {REMEDY}")
        return [found[number] for number in range(len(found))]

    def write(
        self,
        write_batch: WriteBatch,
        what: str,
        *,
        reuse: bool = False,
        decode: Callable[[list[int]], str] | None = None,
        progress: bool = True,
    ) -> list[list[int]]:
        """Return the answers in the order of the prompts; the model is asked for those that are not there.

        Args:
            write_batch: Asks the model.
            what: What is written, for messages, such as "the teacher's responses".
            reuse: Take what other files answered alike from there. What was answered before, and the size of a batch,
                then change which random numbers a prompt gets.
            decode: Text of tokens, which stands beside them for people and is not read again.
            progress: Show a progress bar.

        Raises:
            UserError: If the file, or one that is reused, is damaged.
            OSError: If it cannot be written; what is complete stays and is continued.
        """
        found = self.read()
        if found is None:
            with locked(self.path, what):
                if not self.path.is_file():  # another process may have written it meanwhile
                    self._write(write_batch, what, self._known() if reuse else {}, decode, progress)
            found = self.read()
            assert found is not None
        return found

    def _write(
        self,
        write_batch: WriteBatch,
        what: str,
        known: dict[int, list[int]],
        decode: Callable[[list[int]], str] | None,
        progress: bool,
    ) -> None:
        """Write what is missing, and put the file in its place."""
        partial = self.path.with_suffix(".partial")
        done = self._resume(partial)
        with (
            naming(partial, "the answers before are complete; start again to go on from there"),
            partial.open("ab") as file,
            tqdm(total=len(self._order), initial=done, desc=what, unit="answer", disable=not progress) as bar,
        ):
            for start in range(done, len(self._order), self.batch_size):
                batch = self._order[start : start + self.batch_size]
                asked = [number for number in batch if number not in known]
                answers = write_batch([list(self.prompts[number]) for number in asked], start) if asked else []
                found = known | {n: list(tokens) for n, tokens in zip(asked, answers, strict=True)}
                for number in batch:
                    record = {"prompt": number, "asked": _digest(list(self.prompts[number])), "tokens": found[number]}
                    text = {} if decode is None else {"text": decode(found[number])}
                    file.write(checksummed_line(record | text))
                file.flush()
                bar.update(len(batch))
            os.fsync(file.fileno())
        partial.replace(self.path)

    def _resume(self, partial: Path) -> int:
        """Cut what an interrupted run wrote down to whole batches, and return the number of answers left."""
        if not partial.is_file():
            return 0
        lines = partial.read_bytes().splitlines(keepends=True)
        complete = sum(line.endswith(b"\n") for line in lines)  # a kill tears at most the last one
        # The draws of a batch are numbered from its start.
        whole = complete if complete == len(self._order) else complete - complete % self.batch_size
        kept = b"".join(lines[:whole])
        self._answers(kept, partial)
        with partial.open("r+b") as file:
            file.truncate(len(kept))
        return whole

    def _known(self) -> dict[int, list[int]]:
        """Answers in other files by the prompt's number; one is taken once, so that equal prompts differ as before."""
        found: dict[str, list[list[int]]] = {}
        for other in sorted(self.folder.glob("*.jsonl")):
            if other.name.rpartition("-")[0] == self._alike:
                for record in _records(other.read_bytes(), other):
                    found.setdefault(record["asked"], []).append(record["tokens"])
        return {n: same.pop(0) for n in self._order if (same := found.get(_digest(list(self.prompts[n]))))}

    def _answers(self, content: bytes, path: Path) -> dict[int, list[int]]:
        """Answers by the number of their prompt; they stand in the order they were written in."""
        found = {}
        for line, record in enumerate(_records(content, path), 1):
            number = record["prompt"]
            if line > len(self._order) or number != self._order[line - 1]:
                raise UserError(f"{path}, line {line}: damaged (answers prompt {number} out of order); {REMEDY}")
            found[number] = list(record["tokens"])
        return found


REMEDY = "delete it to write it again"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _records(content: bytes, path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            records.append(read_checksummed_line(line))
            if missing := {"prompt", "asked", "tokens"} - records[-1].keys():
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: damaged ({error}); {REMEDY}") from error
    return records
