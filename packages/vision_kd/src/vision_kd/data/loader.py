"""Loaders with order and augmentation that depend only on seed and epoch, for any number of processes."""

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from kd_common.run.loading import ResumableLoader
from kd_common.run.messages import check_batch_size
from vision_kd.data.augment import SEED_RANGE, Augment, ImageDraws

Batch = tuple[dict[str, Tensor], Tensor]


class EpochSampler(DistributedSampler):
    """Rows of one rank in an epoch, each with the seed of its augmentation.

    The global order and seeds are a pure function of (seed, epoch). Rank r takes rows r, r + world_size, ... of them.
    So the ranks' i-th batches of size b make up the i-th batch of size `b * world_size` of a single process.

    One iteration starts at the rank's row `first`. As a `DistributedSampler` it gets `set_epoch` from Lightning and is
    not replaced by Lightning's own.

    Args:
        count: Number of images.
        batch_size: Images a batch on one rank.
        shuffle: Permute the rows and give every rank equally many (training); otherwise every image appears
            exactly once, in order, on one of the ranks (validation).
        drop_last: Leave out the last global batch when it is incomplete.
        seed: Seed of the whole run.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If dropping the incomplete batch leaves none.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(range(count), world_size, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.count, self.first = count, 0
        global_batch = batch_size * world_size
        if drop_last:
            check_batch_size(count, "training images", batch_size, world_size)
            self.total_size = count - count % global_batch
        elif shuffle:
            self.total_size = count + -count % world_size  # wraps around, so that all ranks make equally many steps
        else:
            self.total_size = count
        self.num_samples = len(range(rank, self.total_size, world_size))

    def rows(self, streams: int = 1) -> tuple[Tensor, Tensor]:
        """Return this rank's image numbers of the epoch, shape (n,), and their seeds, shape (streams, n)."""
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1).item()
        generator = torch.Generator().manual_seed(state)
        order = self.order(generator)
        order = order[torch.arange(self.total_size) % self.count]
        seeds = torch.randint(SEED_RANGE, (streams, self.total_size), generator=generator)
        return order[self.rank :: self.num_replicas], seeds[:, self.rank :: self.num_replicas]

    def order(self, generator: torch.Generator) -> Tensor:
        """Return all image numbers in the order of this epoch, shape (count,)."""
        return torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, self.first = self.first, 0
        order, seeds = self.rows()
        return iter(zip(order[first:].tolist(), seeds[0, first:].tolist(), strict=True))


class DeviceLoader(ResumableLoader):
    """Augmented batches of a small data set that lives on the training device as uint8.

    Order and augmentation are drawn for a whole epoch at once. A batch then takes a few tensor operations, without
    worker processes or work per image.

    Args:
        images: Shape (N, C, H, W), uint8.
        labels: Shape (N,), int64, on the same device.
        batch_size: Images a batch on one rank.
        augment: The views to make, by name.
        shuffle: See `EpochSampler`.
        drop_last: See `EpochSampler`.
        seed: Seed of the whole run.
        rank: This process.
        world_size: Number of processes.

    Yields:
        `(views, target)`: every view float32 in [0, 1] of shape (batch, C, H, W), not normalised; target (batch,).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        augment: Mapping[str, Augment],
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                "images must be uint8 of shape (N, C, H, W) with one label each, got "
                f"{images.dtype} {tuple(images.shape)} and {len(labels)} labels"
            )
        self.images, self.labels, self.batch_size, self.augment = images, labels, batch_size, dict(augment)
        self.sampler = EpochSampler(
            len(images),
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def batches(self, first: int) -> Iterator[Batch]:
        """Return the batches of the chosen epoch from one of them on."""
        order, seeds = (part.to(self.images.device) for part in self.sampler.rows(len(self.augment)))
        for start in range(first * self.batch_size, len(order), self.batch_size):
            batch = slice(start, start + self.batch_size)
            images = self.images.index_select(0, order[batch])
            views = {
                name: augment(images, ImageDraws(seeds[stream, batch])).to(torch.float32).div_(255)
                for stream, (name, augment) in enumerate(self.augment.items())
            }
            yield views, self.labels.index_select(0, order[batch])

    def sample(self, count: int) -> Batch:
        """Return the first samples of epoch 0 as one batch."""
        few = copy.copy(self)
        few.batch_size = count
        return next(few.batches(0))

    def fingerprint(self) -> str:
        """Return the sizes and the seed that decide on the batches."""
        return repr((len(self.images), self.batch_size, self.sampler.num_replicas, self.sampler.seed))
