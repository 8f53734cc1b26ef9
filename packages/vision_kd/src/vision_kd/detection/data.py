"""COCO-format data for detectors: images scaled, grouped by shape and handed out with their boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from kd_common.checks import within
from kd_common.errors import UserError
from kd_common.run.loading import WorkerLoader
from vision_kd.data.augment import ImageDraws
from vision_kd.data.base import WORKERS, ImageDataModule, data_root
from vision_kd.data.digest import files_digest, tensors_digest
from vision_kd.data.loader import EpochSampler
from vision_kd.detection.coco import Split, read_image, read_split
from vision_kd.detection.scenes import build_scenes

SAMPLER_SEEDS = 2**31
Sample = tuple[Tensor, dict[str, Any]]


class ShapeSampler(EpochSampler):
    """Sampler whose batches hold landscape or portrait images alone, so that padding wastes little.

    Every whole batch of all ranks together has one shape; the remaining images of both shapes make mixed batches. The
    order of the batches is random. The images of an epoch are the same as in `EpochSampler`.

    Args:
        portrait: Whether each image is higher than wide, (N,), bool.
        batch_size: Images a batch on one rank.
        seed: Seed of the whole run.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, portrait: Tensor, batch_size: int, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(
            len(portrait), batch_size, shuffle=True, drop_last=True, seed=seed, rank=rank, world_size=world_size
        )
        self.portrait = portrait
        self.global_batch = batch_size * world_size

    def order(self, generator: torch.Generator) -> Tensor:
        """Return all image numbers, the whole batches first."""
        shuffled = super().order(generator)
        groups = [shuffled[self.portrait[shuffled] == shape] for shape in (False, True)]
        whole = [len(group) - len(group) % self.global_batch for group in groups]
        left = torch.cat([group[end:] for group, end in zip(groups, whole, strict=True)])
        left = left[torch.randperm(len(left), generator=generator)]
        rows = torch.cat([*(group[:end] for group, end in zip(groups, whole, strict=True)), left])
        batches = rows[: len(rows) - len(rows) % self.global_batch].view(-1, self.global_batch)
        mixed = batches[torch.randperm(len(batches), generator=generator)]
        return torch.cat([mixed.view(-1), rows[batches.numel() :]])


def scaled_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """Return width and height with the short side at `short`, or the long one at `longest` if that is smaller."""
    scale = min(short / min(width, height), longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


class DetectionImages(Dataset[Sample]):
    """Images of a split with their ground truth, indexed by the pairs (row, seed) of an `EpochSampler`.

    Args:
        split: The images.
        sizes: Short sides in pixels; one is drawn for every image.
        longest: Upper limit of the long side.
        flip: Whether to mirror half of the images.
    """

    def __init__(self, split: Split, sizes: Sequence[int], longest: int, flip: bool) -> None:
        self.split, self.sizes, self.longest, self.flip = split, tuple(sizes), longest, flip

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        row, seed = item
        draws = ImageDraws(torch.tensor([seed]))
        original = read_image(self.split, row)
        short = self.sizes[int(draws.below(len(self.sizes)))]
        width, height = scaled_size(original.shape[2], original.shape[1], short, self.longest)
        image = F.resize(original, [height, width], antialias=True)
        ratio = torch.tensor([width, height] * 2) / self.split.sizes[row].repeat(2)
        boxes, labels = self.split.truth(row)
        boxes = boxes * ratio
        if int(draws.below(2)) and self.flip:
            image = image.flip(-1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, {
            "boxes": boxes,
            "labels": labels,
            "seed": int(draws.below(SAMPLER_SEEDS)),
            "image_id": self.split.image_ids[row],
            "ratio": ratio,
        }


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return two lists, because images of different sizes cannot be stacked."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class COCO(ImageDataModule):
    """COCO, or any data in its format: `root/{train,val}2017` and `root/annotations/instances_*.json`.

    Batches are `(images, targets)`, two lists. Images are uint8 (3, H, W), scaled but not normalised. A target has
    `boxes` (G, 4) as x1, y1, x2, y2 in pixels of the scaled image, `labels` (G,) from 1, `seed`, `image_id`, and
    `ratio` (4,), scaled over original size in x, y, x, y. Training ignores crowd regions; validation treats them as
    pycocotools does. Order, scale, mirroring and the detector's sampling are a pure function of (seed, epoch).

    Args:
        root: Folder that the other paths are relative to; `$KD_DATA/coco` by default.
        train_annotations: Annotation file of the training images.
        train_images: Folder of the training images.
        val_annotations: Annotation file of the validation images; it must have the same categories.
        val_images: Folder of the validation images.
        train_sizes: Short sides in pixels; each training image draws one of them.
        val_size: Short side in validation.
        longest: Upper limit of the long side.
        flip: Mirror half of the training images.
        num_workers: Worker processes of each loader.
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.
        train_subset: Train on the first so many images only.

    Raises:
        UserError: If a size is not positive, or as in `read_split`, or if the annotations are missing.
    """

    in_channels = 3
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | None = None,
        train_annotations: str = "annotations/instances_train2017.json",
        train_images: str = "train2017",
        val_annotations: str = "annotations/instances_val2017.json",
        val_images: str = "val2017",
        train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800),
        val_size: int = 800,
        longest: int = 1333,
        flip: bool = True,
        num_workers: int = WORKERS,
        batch_size: int = 8,
        val_batch_size: int = 8,
        seed: int = 0,
        train_subset: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        if not train_sizes or min(*train_sizes, val_size, longest) < 1:
            raise UserError(
                f"train_sizes, val_size and longest must be positive pixels, got {train_sizes}, {val_size}, {longest}"
            )
        self.root = Path(root).expanduser() if root else data_root() / "coco"
        self.files = {"train": (train_annotations, train_images), "val": (val_annotations, val_images)}
        self.train_sizes, self.val_size, self.longest = tuple(train_sizes), val_size, longest
        self.flip, self.num_workers, self.train_subset = flip, num_workers, train_subset
        self._splits: dict[str, Split] = {}

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the names of the categories, in the order of their labels 1, 2, ..."""
        return self.split("val").class_names

    def split(self, name: str) -> Split:
        """Return the images of `train` or `val`, read once."""
        if name not in self._splits:
            annotations, images = (self.root / part for part in self.files[name])
            self._splits[name] = read_split(annotations, images, train=name == "train")
        return self._splits[name]

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that the stage needs; both must have the same categories."""
        val = self.split("val")
        if stage not in (None, "fit"):
            return
        train = self.split("train")
        if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
            raise UserError(
                "the training and the validation annotations differ in their categories: "
                f"{_categories(train)} and {_categories(val)}"
            )
        if self.train_subset is not None:
            within("train_subset", self.train_subset, f"[1, {len(train)}]")

    def training_digest(self) -> str:
        """Return the digest of images, boxes and labels; see `files_digest`."""
        split = self.split("train")
        truth = tensors_digest([split.sizes, split.boxes, split.labels, split.starts])
        return files_digest(split.folder, [split.folder / name for name in split.files], [split.files, truth])

    def train_dataloader(self) -> WorkerLoader:
        """Return the batches of this rank's share, in a new order every epoch."""
        split = self.split("train")
        shapes = split.sizes[: self.train_subset]
        ranks = {"seed": self.seed, "rank": self.rank, "world_size": self.world_size}
        sampler = ShapeSampler(shapes[:, 1] > shapes[:, 0], self.batch_size, **ranks)
        images = DetectionImages(split, self.train_sizes, self.longest, self.flip)
        return self._loader(images, self.batch_size, sampler)

    def val_dataloader(self) -> WorkerLoader:
        """Return the validation images of this rank, each exactly once over all ranks."""
        images = DetectionImages(self.split("val"), [self.val_size], self.longest, flip=False)
        ranks = {"rank": self.rank, "world_size": self.world_size}
        sampler = EpochSampler(len(images), self.val_batch_size, shuffle=False, drop_last=False, **ranks)
        return self._loader(images, self.val_batch_size, sampler)

    def _loader(self, images: DetectionImages, batch_size: int, sampler: EpochSampler) -> WorkerLoader:
        return WorkerLoader(
            images,
            batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class DigitScenes(COCO):
    """320 training and 100 validation scenes: scikit-learn's digits on its photographs, 1 to 5 on most of them.

    Images have 240 x 320 pixels, landscape or portrait. Digits have 32 to 200 pixels, so that COCO's small, medium and
    large all occur, and are not mirrored. The data are built on first use in `$KD_DATA` (default `~/.cache/kd_data`),
    10 MB, without a download.

    Args:
        train_sizes: As in `COCO`.
        val_size: As in `COCO`.
        num_workers: As in `COCO`.
        batch_size: As in `COCO`.
        val_batch_size: As in `COCO`.
        seed: As in `COCO`; the scenes themselves do not depend on it.
        train_subset: As in `COCO`.
    """

    def __init__(
        self,
        train_sizes: tuple[int, ...] = (96, 112, 128),
        val_size: int = 112,
        num_workers: int = 0,
        batch_size: int = 8,
        val_batch_size: int = 10,
        seed: int = 0,
        train_subset: int | None = None,
    ) -> None:
        super().__init__(
            root=str(data_root() / "digit_scenes_1"),
            train_annotations="annotations/instances_train.json",
            train_images="train",
            val_annotations="annotations/instances_val.json",
            val_images="val",
            train_sizes=train_sizes,
            val_size=val_size,
            longest=4 * max(*train_sizes, val_size),
            flip=False,
            num_workers=num_workers,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            seed=seed,
            train_subset=train_subset,
        )

    def split(self, name: str) -> Split:
        """Return the images of a split, built when they are not there."""
        build_scenes(self.root)
        return super().split(name)


def _categories(split: Split) -> str:
    return ", ".join(f"{i} {name}" for i, name in list(zip(split.category_ids, split.class_names, strict=True))[:5])
