"""CIFAR-10 and CIFAR-100 from torchvision's archives or from an image tree."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from kd_common.errors import UserError
from vision_kd.data.augment import random_crop_flip
from vision_kd.data.base import TensorDataModule, data_root, fetching, missing_data
from vision_kd.data.image_files import read_rgb
from vision_kd.data.image_folder import list_images

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class CIFAR10(TensorDataModule):
    """CIFAR-10: 50,000 training and 10,000 validation images, 32 x 32 pixels, in 10 classes.

    The weak view crops with padding 4 and mirrors.

    Args:
        root: Folder that holds torchvision's archive, or a tree `train/<class>/*` and `test/<class>/*` of 32 x 32
            images; by default KD_DATA or ~/.cache/kd_data.
        download: Fetch the archive into `root` with torchvision when neither is there.
        batch_size: Training images a batch on one rank; an incomplete last batch is left out.
        val_batch_size: Validation images a batch on one rank.
        seed: Seed of the order and the augmentation.
        train_subset: Train on this many images only, the first of a fixed order with balanced classes.
    """

    title = "CIFAR-10"
    archive = torchvision.datasets.CIFAR10
    class_names = tuple(_CIFAR10.split())
    in_channels, image_size = 3, 32
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    weak = staticmethod(random_crop_flip)

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
        self.folder, self.download = data_root(root), download

    def _places(self) -> tuple[Path, Path]:
        return self.folder / self.archive.base_folder, self.folder / "train"

    def prepare_data(self) -> None:
        """Download the archive if the data are missing and downloads are allowed."""
        if self.download and not any(place.is_dir() for place in self._places()):
            with fetching(self.title, self.folder):
                self.archive(self.folder, download=True)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return one split, from the archive if it is there, else from the image tree."""
        unpacked, tree = self._places()
        if unpacked.is_dir():
            return self._load_archive(train)
        if tree.is_dir():
            return self._load_tree(self.folder / ("train" if train else "test"))
        raise missing_data(
            self.title,
            [unpacked, tree],
            "the setting download=true; the variable KD_DATA and the setting root name another folder",
        )

    def _load_archive(self, train: bool) -> tuple[Tensor, Tensor]:
        try:
            split = self.archive(self.folder, train=train)
        except RuntimeError as error:  # torchvision compares the checksum of every file before reading it
            raise UserError(
                f"a file in {self._places()[0]} is missing, truncated or damaged: delete that folder and set "
                "download=true"
            ) from error
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)

    def _load_tree(self, folder: Path) -> tuple[Tensor, Tensor]:
        paths, labels = list_images(folder, self.class_names)
        images = torch.empty(len(paths), self.in_channels, self.image_size, self.image_size, dtype=torch.uint8)
        for row, path in enumerate(paths):
            image = read_rgb(path)
            if image.shape != images.shape[1:]:
                raise UserError(f"{path} has shape {tuple(image.shape)}, {self.title} needs {tuple(images.shape[1:])}")
            images[row] = image
        return images, torch.tensor(labels)


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 training and 10,000 validation images, 32 x 32 pixels, in 100 classes; see `CIFAR10`."""

    title = "CIFAR-100"
    archive = torchvision.datasets.CIFAR100
    class_names = tuple(_CIFAR100.split())
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
