"""Base class of image data: recipe, views, and loaders that shard themselves."""

import copy
import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from kd_common.errors import UserError
from kd_common.run.messages import check_batch_size
from vision_kd.data.augment import Augment, identity, strong
from vision_kd.data.digest import batches_digest, tensors_digest
from vision_kd.data.loader import DeviceLoader

VIEWS = ("weak", "strong")
WORKERS = min(4, os.cpu_count() or 1)
"""Number of processes that load images from files by default."""


UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and half surrogate pairs: names with them cannot be shown or stored."""


def data_root(root: str | None = None) -> Path:
    """Return the folder of data sets: `root` if given, else the environment variable KD_DATA, else ~/.cache/kd_data."""
    return Path(root or os.environ.get("KD_DATA") or "~/.cache/kd_data").expanduser()


class MissingDataError(UserError):
    """A data set is in none of the places searched."""


def missing_data(name: str, places: Sequence[Path], hint: str) -> MissingDataError:
    """Return the error for a data set that is in none of the places searched."""
    listed = "\n".join(f"  {place}" for place in places)
    return MissingDataError(f"{name} not found. Looked in:\n{listed}\nGet it with: {hint}")


@contextmanager
def fetching(name: str, folder: Path) -> Iterator[None]:
    """Add to the error of a failed download its purpose, and the folder in which to put the files instead.

    Raises:
        OSError: If it fails.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter from torchvision, when no mirror answers
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"data.download: {name} could not be fetched ({error}); fetch it on a machine with network and copy what "
            f"lies in {folder} there to {folder} here, or set data.root to where it is"
        ) from error


def stratified_order(labels: Tensor, seed: int = 0) -> Tensor:
    """Return a random order of the samples in which every prefix has the classes in proportion, up to one sample.

    Args:
        labels: Shape (N,), int64.
        seed: Seed of the order.

    Returns:
        Sample numbers, shape (N,), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    shares = torch.empty(len(labels))
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero()[:, 0]
        shares[members] = (torch.arange(len(members)) + torch.rand((), generator=generator)) / len(members)
    return shuffled[shares.argsort(stable=True)]


class ImageDataModule(LightningDataModule):
    """Base class of the image data sets.

    Training batches are `(views, target)`: `views` maps "weak" and, when asked for, "strong" to float32 images in
    [0, 1] of shape (N, C, H, W). Validation batches are `({"clean": images}, target)`. Images are not normalised:
    teacher and student each apply their own mean and standard deviation.

    Args:
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.

    Attributes:
        num_classes: Number of classes.
        class_names: Names of the classes, in the order of the labels.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels; None where images differ in size.
        mean: Mean of every channel in [0, 1].
        std: Standard deviation of every channel.

    Raises:
        UserError: If a batch size is not positive.
    """

    class_names: tuple[str, ...]
    in_channels: int
    image_size: int | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(self, batch_size: int = 64, val_batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.batch_size, self.val_batch_size, self.seed = batch_size, val_batch_size, seed
        self._views: tuple[str, ...] = ("weak",)

    @property
    def settings(self) -> dict[str, Any]:
        """Class and arguments in plain types, as a configuration names them."""
        given = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        settings: dict[str, Any] = json.loads(json.dumps(given, default=str))
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": settings}

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def views(self) -> tuple[str, ...]:
        """Views of every training batch; set this before the training loader is made."""
        return self._views

    @views.setter
    def views(self, names: Sequence[str]) -> None:
        if not names or set(names) - set(VIEWS):
            raise UserError(f"views must be some of {VIEWS}, got {tuple(names)}")
        self._views = tuple(name for name in VIEWS if name in names)  # weak first: its randomness stays the same

    @property
    def rank(self) -> int:
        """Return the rank of this process in the trainer; 0 without a trainer."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Return the number of processes of the trainer; 1 without a trainer."""
        return self.trainer.world_size if self.trainer else 1

    def check_batch(self, world_size: int) -> None:
        """Raise for a batch that the training set does not fill, before a teacher is trained.

        Args:
            world_size: Number of processes.

        Raises:
            UserError: If it does not fill one on each process, or from reading it, or if there is none.
        """
        self.prepare_data()
        self.setup("fit")
        single = copy.copy(self)
        single.batch_size = 1  # every data set provides a loader of single images, which knows their number
        check_batch_size(len(single.train_dataloader().sampler), "training images", self.batch_size, world_size)

    def training_digest(self) -> str:
        """Return a digest of the training data's content, once it is set up.

        By default the first batches are hashed; a data set may override it with something cheaper.
        """
        return batches_digest(self.train_dataloader())


class TensorDataModule(ImageDataModule):
    """Small data set that stays on the training device as uint8 and is augmented there.

    A subclass names its recipe in class attributes and implements `load`.

    Args:
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.
        train_subset: Train on this many images only, the first of a fixed order with balanced classes.

    Attributes:
        weak: The weak augmentation.
    """

    weak: Augment

    def __init__(
        self, batch_size: int = 64, val_batch_size: int = 256, seed: int = 0, train_subset: int | None = None
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        self.train_subset = train_subset
        self._splits: dict[bool, tuple[Tensor, Tensor]] = {}

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the images of one split, shape (N, C, H, W), uint8, and their labels, shape (N,), int64."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that the stage needs, once."""
        for train in (True, False) if stage in (None, "fit") else (False,):
            if train not in self._splits:
                images, labels = self.load(train)
                if train and self.train_subset is not None:
                    if not 1 <= self.train_subset <= len(images):
                        raise UserError(
                            f"train_subset must be in [1, {len(images)}], the size of the training set, "
                            f"got {self.train_subset}"
                        )
                    chosen = stratified_order(labels)[: self.train_subset]
                    images, labels = images[chosen], labels[chosen]
                self._splits[train] = images, labels

    def training_digest(self) -> str:
        """Return the digest of every pixel and label."""
        return tensors_digest(self._splits[True])

    def _loader(self, train: bool) -> DeviceLoader:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        images, labels = self._splits[train]
        self._splits[train] = images, labels = images.to(device), labels.to(device)
        available: dict[str, Augment] = {"weak": self.weak, "strong": partial(strong, weak=self.weak)}
        return DeviceLoader(
            images,
            labels,
            self.batch_size if train else self.val_batch_size,
            {name: available[name] for name in self.views} if train else {"clean": identity},
            shuffle=train,
            drop_last=train,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def train_dataloader(self) -> DeviceLoader:
        """Augmented batches of this rank's share, in a new order every epoch."""
        return self._loader(train=True)

    def val_dataloader(self) -> DeviceLoader:
        """Return the validation images of this rank, each exactly once over all ranks."""
        return self._loader(train=False)
