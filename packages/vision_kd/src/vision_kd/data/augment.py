"""Random views of a batch of uint8 images, computed on the device where the images live.

Every view is a pure function of the images and of one random integer per image. The loader draws the integers of a
global batch once and hands each rank its rows. So the views do not depend on the number of processes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

SEED_RANGE = 2**62
BINS = 31  # levels of RandAugment's magnitude
CUTOUT_GREY = 127  # the fill of the FixMatch policy, which MLKD and CRLD use


class ImageDraws:
    """Uniform integers for every image of a batch, unrolled digit by digit from one seed per image.

    Reading a seed as a mixed-radix number makes its digits independent and uniform. The bias is of the order of
    (product of the bases) / 2^62, below 1e-9 for every view here.

    Args:
        seeds: Shape (N,), int64, uniform in [0, 2^62).
    """

    def __init__(self, seeds: Tensor) -> None:
        self._rest = seeds

    def below(self, base: int) -> Tensor:
        """Return the next uniform integer in [0, base) of every image, shape (N,), int64."""
        digit = self._rest % base
        self._rest = self._rest // base
        return digit


Augment = Callable[[Tensor, ImageDraws], Tensor]


def identity(images: Tensor, draws: ImageDraws) -> Tensor:
    """Return the images as they are: the view used for validation."""
    return images


def random_crop_flip(images: Tensor, draws: ImageDraws, *, padding: int = 4, flip: bool = True) -> Tensor:
    """Return the crops of the zero-padded images at uniform offsets, mirrored with probability one half.

    The distribution is the same as in torchvision's `RandomCrop(size, padding=padding)` followed by
    `RandomHorizontalFlip()`.

    Args:
        images: Shape (N, C, H, W), uint8.
        draws: The random integers of these N images.
        padding: Rows and columns of zeros added on every side; offsets are uniform in [0, 2 * padding].
        flip: Whether to mirror.

    Returns:
        Views of shape (N, C, H, W), uint8.
    """
    count, channels, height, width = images.shape
    top, left = draws.below(2 * padding + 1), draws.below(2 * padding + 1)
    chosen = torch.arange(count, device=images.device)
    if flip:
        # Mirror all images and look up the wanted half: five times faster than `torch.where` on bytes.
        mirrored = draws.below(2)
        images = torch.cat([images, images.flip(-1)])
        chosen = chosen + count * mirrored
        left = torch.where(mirrored.bool(), 2 * padding - left, left)  # crop, then mirror: the offset is from the right
    padded = pad(images, [padding] * 4)
    rows, columns = padded.shape[-2:]
    # Every output row is a run of `width` pixels in memory. Indexing the runs by their start moves whole rows and needs
    # one index a row, not one a pixel; measured 1.5 to 10 times faster than the other forms.
    runs = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    planes = chosen[:, None] * channels + torch.arange(channels, device=images.device)
    corner = planes * (rows * columns) + (top * columns + left)[:, None]
    starts = corner[:, :, None] + torch.arange(height, device=images.device) * columns
    return runs.index_select(0, starts.view(-1)).view(count, channels, height, width)


def _operations(magnitude: int, height: int, width: int) -> list[Callable[[Tensor], Tensor]]:
    """Return the 14 RandAugment operations, each twice.

    The second has the opposite sign, or repeats an operation without a sign.
    """

    def level(first: float, last: float) -> float:
        return torch.linspace(first, last, BINS)[magnitude].item()  # rounded to float32 as torchvision does

    affine = partial(F.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    shear, colour = math.degrees(math.atan(level(0, 0.3))), level(0, 0.9)
    right, down = int(level(0, 150 / 331 * width)), int(level(0, 150 / 331 * height))
    pairs: list[list[Callable[[Tensor], Tensor]]] = [
        [torch.clone] * 2,
        [partial(affine, shear=[sign * shear, 0.0], center=[0.0, 0.0]) for sign in (1, -1)],
        [partial(affine, shear=[0.0, sign * shear], center=[0.0, 0.0]) for sign in (1, -1)],
        [partial(affine, translate=[sign * right, 0]) for sign in (1, -1)],
        [partial(affine, translate=[0, sign * down]) for sign in (1, -1)],
        [partial(F.rotate, angle=sign * level(0, 30)) for sign in (1, -1)],
        [partial(F.adjust_brightness, brightness_factor=1 + sign * colour) for sign in (1, -1)],
        [partial(F.adjust_saturation, saturation_factor=1 + sign * colour) for sign in (1, -1)],
        [partial(F.adjust_contrast, contrast_factor=1 + sign * colour) for sign in (1, -1)],
        [partial(F.adjust_sharpness, sharpness_factor=1 + sign * colour) for sign in (1, -1)],
        [partial(F.posterize, bits=8 - round(4 * magnitude / (BINS - 1)))] * 2,
        [partial(F.solarize, threshold=255 * level(1, 0))] * 2,
        [F.autocontrast] * 2,
        [F.equalize] * 2,
    ]
    return [operation for pair in pairs for operation in pair]


def rand_augment(images: Tensor, draws: ImageDraws, *, num_ops: int = 2, magnitude: int = 10) -> Tensor:
    """Return RandAugment with torchvision's operations and magnitudes (31 bins), drawn for every image on its own.

    Images with the same operation are transformed together. This takes a few dozen calls a batch and leaves torch's
    global random state alone.

    Args:
        images: Shape (N, C, H, W), uint8, C in {1, 3}.
        draws: The random integers of these N images.
        num_ops: Operations applied one after another.
        magnitude: Strength in [0, 30].

    Returns:
        Views of shape (N, C, H, W), uint8.

    References:
        Cubuk et al., RandAugment, arXiv 1909.13719.
    """
    operations = _operations(magnitude, *images.shape[-2:])
    images = images.clone()
    for _ in range(num_ops):
        drawn = [operations[code] for code in draws.below(len(operations)).tolist()]
        for operation in dict.fromkeys(drawn):
            rows = torch.tensor([row for row, other in enumerate(drawn) if other is operation], device=images.device)
            images[rows] = operation(images[rows])
    return images


def cutout(images: Tensor, draws: ImageDraws, *, size: int) -> Tensor:
    """Return the images with a grey square at a uniform centre, clipped at the image's borders.

    Args:
        images: Shape (N, C, H, W), uint8.
        draws: The random integers of these N images.
        size: Side of the square in pixels.

    Returns:
        Views of shape (N, C, H, W), uint8.

    References:
        DeVries and Taylor, Cutout, arXiv 1708.04552.
    """

    def covered(length: int) -> Tensor:
        first = draws.below(length)[:, None] - size // 2
        position = torch.arange(length, device=images.device)
        return (position >= first) & (position < first + size)

    square = covered(images.shape[-2])[:, None, :, None] & covered(images.shape[-1])[:, None, None, :]
    return images.masked_fill(square, CUTOUT_GREY)


def distort(images: Tensor, draws: ImageDraws) -> Tensor:
    """Distort a weak view by RandAugment(2, 10), then cut out a square of half the image's side."""
    return cutout(rand_augment(images, draws), draws, size=images.shape[-1] // 2)


def strong(images: Tensor, draws: ImageDraws, *, weak: Augment) -> Tensor:
    """Return the strong view of MLKD and CRLD: the weak augmentation, then `distort`."""
    return distort(weak(images, draws), draws)
