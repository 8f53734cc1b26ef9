"""Handwritten digits that come with scikit-learn: no download, 8 x 8 pixels."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vision_kd.data.augment import random_crop_flip
from vision_kd.data.base import TensorDataModule, stratified_order

TEST_IMAGES = 500


class Digits(TensorDataModule):
    """The 1,797 handwritten digits of scikit-learn: 1,297 for training, 500 for validation, classes balanced.

    The weak view shifts by up to one pixel; digits are not mirrored. See `TensorDataModule` for the arguments.
    """

    class_names = tuple("0123456789")
    in_channels, image_size = 1, 8
    mean, std = (0.3053,), (0.3761,)
    weak = staticmethod(partial(random_crop_flip, padding=1, flip=False))

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the digits with their 17 grey levels spread over 0..255."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        order = stratified_order(labels)
        rows = order[TEST_IMAGES:] if train else order[:TEST_IMAGES]
        return images[rows], labels[rows]
