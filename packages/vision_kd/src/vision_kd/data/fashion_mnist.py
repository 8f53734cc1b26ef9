"""Fashion-MNIST from its four idx files, packed or unpacked."""

import gzip
import math
import zlib
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from kd_common.errors import UserError
from vision_kd.data.augment import random_crop_flip
from vision_kd.data.base import TensorDataModule, data_root, fetching, missing_data

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 2**28  # Fashion-MNIST has 47 million; a small packed file could unpack to more than the memory
FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> Tensor:
    """Return the array of unsigned bytes in an idx file, gzip-packed when its name ends in .gz.

    Args:
        path: The file.

    Returns:
        A uint8 tensor of the shape that the file's header states.

    Raises:
        UserError: If the file is damaged, truncated, too large or holds something else.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): delete it and fetch it again") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} unpacks to more than {MOST_BYTES:,} bytes: delete it and fetch it again")
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:3] != b"\x00\x00\x08" or len(content) != start + math.prod(shape) or len(content) == start:
        raise UserError(
            f"{path} is not a complete idx file of unsigned bytes: its header states {shape}, "
            f"it holds {len(content)} bytes. Delete it and fetch it again"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


class FashionMNIST(TensorDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 validation images of clothes, 28 x 28 pixels, grey.

    The weak view crops with padding 2 and mirrors.

    Args:
        root: Folder that holds the idx files or torchvision's `FashionMNIST/raw`; by default KD_DATA or
            ~/.cache/kd_data and then Debian's /usr/share/datasets/fashion-mnist.
        download: Fetch the files into `root` with torchvision when they are in none of these places.
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.
        train_subset: Train on this many images only, the first of a fixed order with balanced classes.
    """

    class_names = tuple(torchvision.datasets.FashionMNIST.classes)
    in_channels, image_size = 1, 28
    mean, std = (0.2860,), (0.3530,)
    weak = staticmethod(partial(random_crop_flip, padding=2))

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        batch_size: int = 64,
        val_batch_size: int = 256,
        seed: int = 0,
        train_subset: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed, train_subset)
        self.root, self.download = root, download

    def _places(self) -> list[Path]:
        folder = data_root(self.root)
        return [folder, folder / "FashionMNIST" / "raw"] + ([] if self.root else [DEBIAN_FOLDER])

    def _find(self, train: bool) -> list[Path] | None:
        for place in self._places():
            candidates = [(place / name, place / f"{name}.gz") for name in FILES[train]]
            found = [next((path for path in pair if path.is_file()), None) for pair in candidates]
            if all(found):
                return [path for path in found if path]
        return None

    def prepare_data(self) -> None:
        """Download the files if they are missing and downloads are allowed."""
        if self.download and not (self._find(train=True) and self._find(train=False)):
            folder = data_root(self.root)
            with fetching("Fashion-MNIST", folder):
                torchvision.datasets.FashionMNIST(folder, download=True)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return one split, read from the first place that has both of its files."""
        paths = self._find(train)
        if paths is None:
            raise missing_data(
                "Fashion-MNIST",
                self._places(),
                "the setting download=true, or `apt-get install dataset-fashion-mnist` on Debian; "
                "the variable KD_DATA and the setting root name another folder",
            )
        images, labels = (read_idx(path) for path in paths)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() >= self.num_classes:
            raise UserError(
                f"{paths[0]} and {paths[1]} do not belong together: images {tuple(images.shape)}, "
                f"labels {tuple(labels.shape)} up to {labels.max().item()}"
            )
        return images[:, None], labels.long()
