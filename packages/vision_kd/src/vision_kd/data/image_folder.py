"""Image trees with one folder per class, read by the workers of an ordinary DataLoader."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kd_common.errors import UserError
from kd_common.run.loading import WorkerLoader
from vision_kd.data.augment import SEED_RANGE, ImageDraws, distort
from vision_kd.data.base import UNPRINTABLE, WORKERS, ImageDataModule, MissingDataError, missing_data
from vision_kd.data.digest import files_digest
from vision_kd.data.image_files import (
    endings,
    find_images,
    header_size,
    is_clutter,
    read_rgb,
    spread,
    warn_of_left_out,
)
from vision_kd.data.loader import EpochSampler


def class_folders(split: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders in a split, one per class; hidden folders are no classes.

    Raises:
        UserError: If there is none, or if a name cannot be shown and stored.
    """
    entries = split.iterdir() if split.is_dir() else ()
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise MissingDataError(f"{split} holds no folder per class; data.root must hold train/CLASS/ and val/CLASS/")
    if strange := [name for name in names if UNPRINTABLE.search(name)]:
        raise UserError(
            f"{split}: {strange[0]!r}, the name of a class, has control characters or is no UTF-8: rename it"
        )
    return tuple(names)


def list_images(split: Path, class_names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Return the image files of a split in a fixed order, with their labels; a warning names the skipped files.

    Raises:
        UserError: If the class folders are not the expected ones, or the header of an image is damaged, or if a class
            folder holds no image.
    """
    found, expected = set(class_folders(split)), set(class_names)
    if found != expected:
        raise UserError(
            f"the classes of {split} do not match: missing there {sorted(expected - found)}, "
            f"only there {sorted(found - expected)}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    left_out = [entry for entry in split.iterdir() if entry.name not in found and not is_clutter(entry.name)]
    for label, name in enumerate(class_names):
        files, others = find_images(split / name)
        if not files:
            there = f"; {min(others)} is none" if others else ""
            raise UserError(f"{split / name} holds no image ({', '.join(sorted(endings()))}){there}")
        paths += sorted(files)
        labels += [label] * len(files)
        left_out += others
    warn_of_left_out(split, left_out)
    for row in spread(len(paths)):
        header_size(paths[row])
    return paths, labels


STRIP = 16  # largest ratio of length to width
Transform = Callable[[Tensor, int], dict[str, Tensor]]


class ImageFiles(Dataset[tuple[dict[str, Tensor], int]]):
    """Views and labels of image files, indexed by the pairs (row, seed) of an `EpochSampler`.

    Args:
        paths: The image files.
        labels: Labels of the images.
        transform: Makes the views, uint8, of an image and its seed.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[dict[str, Tensor], int]:
        row, seed = item
        views = self.transform(read_rgb(self.paths[row]), seed)
        return {name: view.to(torch.float32).div(255) for name, view in views.items()}, self.labels[row]


def training_views(image: Tensor, seed: int, *, size: int, views: Sequence[str]) -> dict[str, Tensor]:
    """Return the standard ImageNet crop and mirror as the weak view; the strong view distorts another such crop.

    Args:
        image: Shape (3, H, W), uint8.
        seed: The randomness of all views.
        size: Side of a view in pixels.
        views: Names of the views to make.

    Returns:
        Views of shape (3, size, size), uint8.
    """
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    # torchvision draws from the global CPU state. A private one makes a view depend on its seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name in views:
            made[name] = crop(image)
            if name == "strong":
                draws = ImageDraws(torch.randint(SEED_RANGE, (1,)))
                made[name] = distort(made[name][None], draws)[0]
    return made


def clean_view(image: Tensor, seed: int, *, size: int) -> dict[str, Tensor]:
    """Return the centre crop used for validation.

    The image's short side is first scaled to 8/7 of the crop (256 for 224).
    """
    # The ends of a long strip are cropped away; scaled with the rest they could fill the memory.
    height, width = image.shape[-2:]
    image = F.center_crop(image, [min(height, STRIP * width), min(width, STRIP * height)])
    return {"clean": F.center_crop(F.resize(image, [round(size * 8 / 7)], antialias=True), [size, size])}


class ImageFolder(ImageDataModule):
    """ImageNet, or any tree `root/train/<class>/*` and `root/val/<class>/*`; the classes are the folder names.

    Order and views are a pure function of (seed, epoch) for any number of workers.

    Args:
        root: The folder that holds `train` and `val`.
        image_size: Side of a view in pixels.
        num_workers: Worker processes of each loader.
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.
    """

    in_channels = 3
    image_size: int
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        num_workers: int = WORKERS,
        batch_size: int = 64,
        val_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        if image_size < 1:
            raise UserError(f"image_size must be at least 1 pixel, got {image_size}")
        self.root, self.image_size, self.num_workers = Path(root).expanduser(), image_size, num_workers
        self._files: dict[str, tuple[list[Path], list[int]]] = {}

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Folder names of the training split, or of the validation split if it is the only one."""
        train = self.root / "train"
        return class_folders(train if train.is_dir() else self.root / "val")

    def setup(self, stage: str | None = None) -> None:
        """List the files that the stage needs, once; both splits must have the same classes."""
        splits = ("train", "val") if stage in (None, "fit") else ("val",)
        if all(split in self._files for split in splits):
            return
        for split in splits:
            if not (self.root / split).is_dir():
                raise missing_data(
                    f"The {split} split",
                    [self.root / split],
                    f"the layout {self.root}/{split}/<class>/<image>, or the setting root",
                )
        self._files |= {
            split: list_images(self.root / split, self.class_names) for split in splits if split not in self._files
        }

    def training_digest(self) -> str:
        """Return the digest of the image files; see `files_digest`."""
        paths, labels = self._files["train"]
        return files_digest(self.root, paths, labels)

    def _loader(self, split: str, batch_size: int, transform: Transform) -> WorkerLoader:
        paths, labels = self._files[split]
        train = split == "train"
        sampler = EpochSampler(
            len(paths),
            batch_size,
            shuffle=train,
            drop_last=train,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return WorkerLoader(
            ImageFiles(paths, labels, transform),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> WorkerLoader:
        """Return the batches of this rank's share, in a new order every epoch."""
        return self._loader("train", self.batch_size, partial(training_views, size=self.image_size, views=self.views))

    def val_dataloader(self) -> WorkerLoader:
        """Return the validation images of this rank, each exactly once over all ranks."""
        return self._loader("val", self.val_batch_size, partial(clean_view, size=self.image_size))
