"""Residual networks for small images: resnet8 ... resnet110, resnet8x4, resnet32x4, ResNet18 and ResNet50."""

from collections import OrderedDict
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from vision_kd.models.layers import conv, init_he_, pooled, relu
from vision_kd.models.registry import MODELS


class BasicBlock(nn.Module):
    """Basic block: two 3x3 convolutions around a shortcut.

    Args:
        in_channels: Channels of the input map.
        channels: Channels of both convolutions.
        stride: Stride of the first convolution and of the shortcut.
        shortcut: Attribute name of the shortcut; published weight files disagree on it.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut_name = shortcut
        self.add_module(shortcut, projection(in_channels, channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.get_submodule(self.shortcut_name)(x))


class Bottleneck(nn.Module):
    """Bottleneck block: 1x1, 3x3 and widening 1x1 convolutions around a shortcut.

    Args:
        in_channels: Channels of the input map.
        channels: Channels of the first two convolutions; the last has four times as many.
        stride: Stride of the 3x3 convolution and of the shortcut.
        shortcut: Attribute name of the shortcut.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut_name = shortcut
        self.add_module(shortcut, projection(in_channels, out_channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + self.get_submodule(self.shortcut_name)(x))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity if the shapes agree, else a strided 1x1 convolution and batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def resnet(
    block: type[BasicBlock | Bottleneck],
    depths: tuple[int, ...],
    stem: int,
    widths: tuple[int, ...],
    names: tuple[str, str],
    num_classes: int,
    in_channels: int = 3,
) -> nn.Sequential:
    """Residual network with a 3x3 stem; every stage but the first halves the map (He et al., arXiv 1512.03385).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks of each stage.
        stem: Channels of the first convolution.
        widths: Base channels of each stage.
        names: state-dict names of the shortcuts and of the classifier.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).
    """
    shortcut, head = names
    layers: dict[str, nn.Module] = {
        "conv1": conv(in_channels, stem, 3),
        "bn1": nn.BatchNorm2d(stem),
        "relu": nn.ReLU(inplace=True),
    }
    inputs = [stem] + [width * block.expansion for width in widths]
    for index, (depth, width, (source, target)) in enumerate(zip(depths, widths, pairwise(inputs), strict=True)):
        first = block(source, width, 1 if index == 0 else 2, shortcut)
        rest = [block(target, width, 1, shortcut) for _ in range(depth - 1)]
        layers[f"layer{index + 1}"] = nn.Sequential(first, *rest)
    network = nn.Sequential(OrderedDict(layers | pooled(head, nn.Linear(inputs[-1], num_classes))))
    init_he_(network)
    return network


THREE_STAGE, FOUR_STAGE = ("downsample", "fc"), ("shortcut", "linear")
for depth in (8, 14, 20, 32, 44, 56, 110):
    blocks = ((depth - 2) // 6,) * 3
    MODELS.register(f"resnet{depth}")(partial(resnet, BasicBlock, blocks, 16, (16, 32, 64), THREE_STAGE))
MODELS.register("resnet8x4")(partial(resnet, BasicBlock, (1, 1, 1), 32, (64, 128, 256), THREE_STAGE))
MODELS.register("resnet32x4")(partial(resnet, BasicBlock, (5, 5, 5), 32, (64, 128, 256), THREE_STAGE))
MODELS.register("ResNet18")(partial(resnet, BasicBlock, (2, 2, 2, 2), 64, (64, 128, 256, 512), FOUR_STAGE))
MODELS.register("ResNet50")(partial(resnet, Bottleneck, (3, 4, 6, 3), 64, (64, 128, 256, 512), FOUR_STAGE))
