"""Wide residual networks with pre-activation blocks: wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2."""

from collections import OrderedDict
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from kd_common.errors import UserError
from vision_kd.models.layers import conv, init_he_, pooled, relu
from vision_kd.models.registry import MODELS


class PreActivationBlock(nn.Module):
    """Pre-activation block: two 3x3 convolutions, each after batch norm and ReLU.

    Where the channel count changes, the shortcut is a strided 1x1 convolution of the activated input.

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.convShortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        activated = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(relu(self.bn2(self.conv1(activated))))


def wide_resnet(depth: int, widen: int, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return a wide residual network of three stages (Zagoruyko and Komodakis, arXiv 1605.07146).

    Args:
        depth: Number of convolutions counted as in the paper, 6 n + 4 for n blocks a stage.
        widen: Factor on the stage widths 16, 32, 64.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).

    Raises:
        UserError: If the depth is not 6 n + 4.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if remainder or blocks < 1:
        raise UserError(f"depth of a wide ResNet must be 6 n + 4 (10, 16, 22, ...), got {depth}")
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    layers: dict[str, nn.Module] = {"conv1": conv(in_channels, widths[0], 3)}
    for index, (source, target) in enumerate(pairwise(widths), 1):
        first = PreActivationBlock(source, target, 1 if index == 1 else 2)
        rest = [PreActivationBlock(target, target, 1) for _ in range(blocks - 1)]
        layers[f"block{index}"] = nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))
    layers |= {"bn1": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU(inplace=True)}
    classifier = nn.Linear(widths[-1], num_classes)
    nn.init.zeros_(classifier.bias)
    network = nn.Sequential(OrderedDict(layers | pooled("fc", classifier)))
    init_he_(network)
    return network


for depth in (16, 40):
    for widen in (1, 2):
        MODELS.register(f"wrn_{depth}_{widen}")(partial(wide_resnet, depth, widen))
