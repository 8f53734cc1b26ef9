"""The target's states of a whole corpus in one memory-mapped file of bfloat16 numbers.

A token takes 4 h numbers: the low, middle and high features and the final state. The file is written sequence by
sequence, longest first, which saves padding. Every batch that is on the disk is followed by a line of `progress.jsonl`,
so that a killed writer goes on where it was. It holds the checksums, which the first read of a sequence compares.
"""

import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.files import checksummed_line, complete_lines, naming, read_checksummed_line
from spec_decode.models import CausalLM, States

DATA, PROGRESS = "features.bin", "progress.jsonl"
_BYTES = 2


class FeatureStore:
    """States of every sequence of a corpus.

    Args:
        folder: Folder of the store; one corpus and target each.
        sequences: Token ids of every sequence.
        hidden_size: h.
    """

    def __init__(self, folder: Path, sequences: Sequence[Sequence[int]], hidden_size: int) -> None:
        self.folder, self.sequences, self.width = folder, sequences, 4 * hidden_size
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
        self.order = np.argsort(-np.diff(self.starts), kind="stable")  # of writing
        self._map: np.memmap | None = None
        self._unchecked: dict[int, int] = {}

    @property
    def size(self) -> int:
        """Return the bytes of the complete file."""
        return int(self.starts[-1]) * self.width * _BYTES

    @property
    def done(self) -> int:
        """Return the number of sequences written so far.

        Raises:
            UserError: If the store is damaged.
        """
        return len(self._checksums())

    def _checksums(self) -> list[int | None]:
        """Checksums of the sequences that are complete, in the order of writing; None for stores without any."""
        path, data = self.folder / PROGRESS, self.folder / DATA
        remedy = f"delete {self.folder} to compute the features again"
        lines, checksums = complete_lines(path), []
        for number, line in enumerate(lines, start=1):
            try:
                checksums += read_checksummed_line(line)["checksums"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: damaged ({error}); {remedy}") from error
        if len(checksums) > len(self.sequences):
            raise UserError(
                f"{path} is damaged: {len(checksums)} checksums of {len(self.sequences)} sequences; {remedy}"
            )
        found = data.stat().st_size if data.is_file() else 0
        if checksums and found != self.size:
            raise UserError(f"{data} is damaged: {found} bytes instead of {self.size}; {remedy}")
        return checksums

    def check_disk(self) -> None:
        """Refuse a file that does not fit.

        Raises:
            OSError: If the disk has less than the missing bytes and 5 % free.
        """
        place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        path = self.folder / DATA
        # The file is sparse until it is written: only its blocks count.
        present = path.stat().st_blocks * 512 if path.is_file() else 0
        missing, free = max(self.size - present, 0), shutil.disk_usage(place).free
        if missing * 1.05 > free:
            raise UserError(
                f"the feature cache needs {missing / 1e9:.2f} GB more under {self.folder}, and {free / 1e9:.2f} GB are "
                "free; set data.features to online, take fewer prompts, or set KD_CACHE to a larger disk"
            )

    def write(self, target: CausalLM, *, batch_size: int = 8, progress: bool = True) -> None:
        """Compute and store the states that are missing.

        Raises:
            OSError: If the disk is too small.
            UserError: If the store is damaged.
        """
        done, device = self.done, target.device
        if done == len(self.sequences):
            return
        self.check_disk()
        self.folder.mkdir(parents=True, exist_ok=True)
        path, progress_path = self.folder / DATA, self.folder / PROGRESS
        path.touch()
        progress_path.touch()
        bar = tqdm(total=len(self.sequences), initial=done, desc="target reads", unit="text", disable=not progress)
        # Written, not mapped: a disk that fills up under a map kills the process.
        advice = "the sequences before are complete; free some space and start again to go on from there"
        with bar, naming(path, advice), path.open("r+b") as file, progress_path.open("r+b") as lines:
            file.truncate(self.size)
            lines.truncate(lines.seek(sum(map(len, complete_lines(progress_path)))))
            for start in range(done, len(self.sequences), batch_size):
                places = self.order[start : start + batch_size]
                batch = [self.sequences[place] for place in places]
                tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64, device=device)
                for row, sequence in enumerate(batch):
                    tokens[row, : len(sequence)] = torch.tensor(sequence, device=device)
                states = target(tokens)
                both = torch.cat([states.features, states.final], dim=-1).to(torch.bfloat16).view(torch.int16).cpu()
                checksums = []
                for row, place in enumerate(places):
                    first, end = self.starts[place : place + 2]
                    content = both[row, : end - first].numpy().tobytes()
                    file.seek(int(first) * self.width * _BYTES)
                    file.write(content)
                    checksums.append(zlib.crc32(content))
                _to_disk(file)  # before the line: what it counts is on the disk
                lines.write(checksummed_line({"checksums": checksums}))
                _to_disk(lines)
                bar.update(len(batch))

    def read(self, sequence: int) -> Tensor:
        """States of one sequence, bfloat16 of shape (T, 4h).

        Raises:
            RuntimeError: If it has not been written.
            UserError: If it is damaged.
        """
        if self._map is None:
            checksums = self._checksums()
            if len(checksums) < len(self.sequences):
                raise RuntimeError(
                    f"the feature cache {self.folder} is not complete: {len(checksums)} sequences; write it"
                )
            pairs = zip(self.order.tolist(), checksums, strict=True)
            self._unchecked = {place: checksum for place, checksum in pairs if checksum is not None}
            self._map = np.memmap(self.folder / DATA, np.int16, "r", shape=(int(self.starts[-1]), self.width))
        rows = np.array(self._map[self.starts[sequence] : self.starts[sequence + 1]])
        expected = self._unchecked.get(sequence)
        if expected is not None:
            if zlib.crc32(rows.data) != expected:
                raise UserError(
                    f"{self.folder / DATA} is damaged: the checksum of sequence {sequence} is wrong; delete "
                    f"{self.folder} to compute the features again"
                )
            del self._unchecked[sequence]
        return torch.from_numpy(rows).view(torch.bfloat16)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def split_states(both: Tensor) -> States:
    """States from stored numbers of shape (..., 4h)."""
    hidden = both.shape[-1] // 4
    return States(both[..., : 3 * hidden], both[..., 3 * hidden :])
