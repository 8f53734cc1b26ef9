"""ShuffleNets for 32x32 images: ShuffleV1 (3 groups) and ShuffleV2 (width 1), both with a 1x1 stem."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from vision_kd.models.layers import conv, pooled, relu
from vision_kd.models.registry import MODELS

STEM = 24
GROUPS = 3
DEPTHS = (4, 8, 4)


class GroupedBlock(nn.Module):
    """ShuffleNet unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 (arXiv 1707.01083, figure 2).

    A block that changes the channel count halves the map and concatenates its average-pooled input; the others
    add their input.

    Args:
        in_channels: Channels of the input map; the first block, on the thin stem, is not grouped at its entry.
        out_channels: Channels of the output map.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.halves = in_channels != out_channels
        branch = out_channels - in_channels if self.halves else out_channels
        hidden = branch // 4
        entry_groups = 1 if in_channels == STEM else GROUPS
        self.conv1 = conv(in_channels, hidden, 1, groups=entry_groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle = nn.ChannelShuffle(entry_groups)
        self.conv2 = conv(hidden, hidden, 3, 2 if self.halves else 1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv(hidden, branch, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W), or to half the size where channels change."""
        out = self.shuffle(relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(relu(self.bn2(self.conv2(out)))))
        return relu(torch.cat([out, self.pool(x)], 1) if self.halves else out + x)


class SplitBlock(nn.Module):
    """ShuffleNetV2 unit: one half of the channels passes, the other is convolved (arXiv 1807.11164, figure 3c).

    Args:
        channels: Channels of the input and output maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        kept, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(out)))))
        out = relu(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([kept, out], 1))


class DownBlock(nn.Module):
    """ShuffleNetV2 unit that halves the map in two branches (arXiv 1807.11164, figure 3d).

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map, half of them from each branch.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, 2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x)))))
        right = relu(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))


def stem(in_channels: int) -> dict[str, nn.Module]:
    """Return a 1x1 convolution to the stem's channels, batch norm and ReLU."""
    return {"conv1": conv(in_channels, STEM, 1), "bn1": nn.BatchNorm2d(STEM), "relu": nn.ReLU(inplace=True)}


@MODELS.register("ShuffleV1")
def shufflenet_v1(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return ShuffleNet with three groups, total stride 8 (Zhang et al., arXiv 1707.01083).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).
    """
    layers = stem(in_channels)
    channels = STEM
    for index, (depth, width) in enumerate(zip(DEPTHS, (240, 480, 960), strict=True), 1):
        rest = [GroupedBlock(width, width) for _ in range(depth - 1)]
        layers[f"layer{index}"] = nn.Sequential(GroupedBlock(channels, width), *rest)
        channels = width
    return nn.Sequential(OrderedDict(layers | pooled("linear", nn.Linear(channels, num_classes))))


@MODELS.register("ShuffleV2")
def shufflenet_v2(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return ShuffleNetV2 at width 1, total stride 8 (Ma et al., arXiv 1807.11164).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).
    """
    layers = stem(in_channels)
    channels = STEM
    for index, (depth, width) in enumerate(zip(DEPTHS, (116, 232, 464), strict=True), 1):
        rest = [SplitBlock(width) for _ in range(depth - 1)]
        layers[f"layer{index}"] = nn.Sequential(DownBlock(channels, width), *rest)
        channels = width
    layers |= {"conv2": conv(channels, 1024, 1), "bn2": nn.BatchNorm2d(1024), "relu2": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(layers | pooled("linear", nn.Linear(1024, num_classes))))
