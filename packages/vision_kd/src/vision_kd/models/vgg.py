"""VGG networks with batch norm and one linear classifier: vgg8, vgg11, vgg13, vgg16, vgg19."""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from kd_common.errors import UserError
from vision_kd.models.layers import init_he_, pooled, small_linear
from vision_kd.models.registry import MODELS


class MaxPool(nn.MaxPool2d):
    """2x2 max-pool with a clear error for images that are too small."""

    def forward(self, input: Tensor) -> Tensor:
        """Halve (N, C, H, W); maps below 2x2 raise a ValueError."""
        if min(input.shape[-2:]) < 2:
            raise UserError("image too small for VGG: its three max-pools need at least 8x8 pixels")
        return super().forward(input)


class LateMaxPool(nn.MaxPool2d):
    """2x2 max-pool for maps of at least 8x8, so for images from 64x64; smaller maps pass unchanged."""

    def forward(self, input: Tensor) -> Tensor:
        """Halve (N, C, H, W) when H and W are at least 8."""
        return super().forward(input) if min(input.shape[-2:]) >= 8 else input


def vgg(depths: tuple[int, ...], num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return VGG with batch norm for small images (Simonyan and Zisserman, arXiv 1409.1556).

    Args:
        depths: 3x3 convolutions in each of the five blocks, whose widths are 64, 128, 256, 512, 512.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) from 8x8 pixels to logits (N, num_classes).
    """
    layers: dict[str, nn.Module] = {}
    channels = in_channels
    for index, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        block: list[nn.Module] = []
        for _ in range(depth):
            block += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers[f"block{index}"] = nn.Sequential(*block)
        if index < 4:
            layers[f"pool{index}"] = MaxPool(2) if index < 3 else LateMaxPool(2)
    network = nn.Sequential(OrderedDict(layers | pooled("classifier", small_linear(channels, num_classes))))
    init_he_(network)
    return network


VARIANTS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
for name, depths in VARIANTS.items():
    MODELS.register(name)(partial(vgg, depths))
