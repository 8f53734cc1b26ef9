"""Batches whose content depends on the seed and the epoch alone, for any number of processes."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kd_common.run.loading import ResumableLoader
from kd_common.run.messages import check_batch_size
from llm_kd.data.batch import TokenBatch, collate, pack
from llm_kd.data.example import Example, padding_example

NOBODY = -1
"""Row number of a place in the last validation batch that no example is left for."""


class TextLoader(ResumableLoader):
    """Batches of one rank's share of the examples.

    A row holds one example, or with packing as many as fit; which share a row is drawn once, the order of the rows anew
    every epoch. The ranks' i-th batches of size b make up the i-th batch of size b * world_size of a single process,
    and every rank makes equally many.

    Args:
        examples: Sequences, at least one.
        batch_size: Rows per batch on one rank.
        pad_id: Token that fills up the rows.
        shuffle: Permute the rows and leave out the last incomplete batch (training). Otherwise every example appears
            once, in order, on one of the ranks (validation); a rank for which none is left gets one without a loss.
        pack_length: Tokens of a packed row; None for one example a row.
        seed: Seed of the whole run.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        left_out: Rows left out of every epoch, others each time.

    Raises:
        ValueError: If the rows do not fill one batch on each rank.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        pad_id: int,
        shuffle: bool,
        pack_length: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples, self.batch_size, self.pad_id, self.shuffle = examples, batch_size, pad_id, shuffle
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.rows = [[number] for number in range(len(examples))]
        if pack_length is not None:
            lengths = [len(example.input_ids) for example in examples]
            self.rows = pack(lengths, _permutation(len(examples), seed), pack_length)
        self._global_batch = batch_size * world_size
        self.left_out = len(self.rows) % self._global_batch if shuffle else 0
        if shuffle:
            check_batch_size(len(self.rows), "training rows", batch_size, world_size)
        self.epoch = 0
        self.sampler = self  # Lightning sets the epoch on a loader's sampler

    def __len__(self) -> int:
        return -(-(len(self.rows) - self.left_out) // self._global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration delivers."""
        self.epoch = epoch

    def plan(self) -> list[list[int]]:
        """Row numbers of this rank's batches in the chosen epoch."""
        if self.shuffle:
            order = _permutation(len(self.rows), self.seed, self.epoch)[: len(self.rows) - self.left_out]
        else:
            order = [*range(len(self.rows)), *[NOBODY] * (-len(self.rows) % self.world_size)]
        starts = range(0, len(order), self._global_batch)
        return [order[start : start + self._global_batch][self.rank :: self.world_size] for start in starts]

    def batches(self, first: int) -> Iterator[TokenBatch]:
        """Yield the batches of the chosen epoch from one of them on."""
        unsupervised = padding_example(self.pad_id)
        for batch in self.plan()[first:]:
            yield collate(
                [[unsupervised] if row == NOBODY else [self.examples[n] for n in self.rows[row]] for row in batch],
                self.pad_id,
            )

    def sample(self, count: int) -> TokenBatch:
        """Return a batch of the first rows."""
        return collate([[example] for example in self.examples[:count]], self.pad_id)

    def fingerprint(self) -> str:
        """Return a digest of rows, batch size, seed and packing."""
        settings = (self.rows, self.batch_size, self.world_size, self.seed, self.shuffle)
        content = [repr(settings), *(example.key for example in self.examples)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _permutation(count: int, *seeds: int) -> list[int]:
    """Return a random order of `count` numbers that depends on the seeds alone."""
    state = np.random.SeedSequence(seeds).generate_state(1).item()
    return torch.randperm(count, generator=torch.Generator().manual_seed(state)).tolist()
