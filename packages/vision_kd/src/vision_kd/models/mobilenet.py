"""MobileNetV2 for 32x32 images and MobileNetV1 for ImageNet.

The ImageNet "MobileNetV2" of the distillation literature is MobileNetV1: its published code is a stack of
depthwise-separable convolutions with 1024 features.
"""

from collections import OrderedDict

from torch import Tensor, nn

from vision_kd.models.layers import conv, conv_bn_relu, init_he_, pooled, small_linear
from vision_kd.models.registry import MODELS


class InvertedResidual(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise and linear 1x1 projection, with a shortcut if the shapes agree.

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map.
        stride: Stride of the depthwise convolution.
        expansion: Factor of the 1x1 expansion.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


# (expansion, channels at width 1, blocks, stride of the first block)
V2_STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


@MODELS.register("MobileNetV2")
def mobilenet_v2(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return MobileNetV2 at half width, total stride 16, plain ReLU (after Sandler et al., arXiv 1801.04381).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).
    """
    channels = 16
    layers = {"conv1": conv_bn_relu(in_channels, channels, 3, stride=2)}
    stages = []
    for expansion, width, depth, stride in V2_STAGES:
        blocks = []
        for index in range(depth):
            blocks.append(InvertedResidual(channels, width // 2, stride if index == 0 else 1, expansion))
            channels = width // 2
        stages.append(nn.Sequential(*blocks))
    layers |= {"blocks": nn.Sequential(*stages), "conv2": conv_bn_relu(channels, 1280, 1)}
    classifier = nn.Sequential(small_linear(1280, num_classes))
    network = nn.Sequential(OrderedDict(layers | pooled("classifier", classifier)))
    init_he_(network)
    return network


# (output channels, stride) of each depthwise-separable pair
V1_PAIRS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


@MODELS.register("MobileNetV1")
def mobilenet_v1(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Return MobileNetV1 at full width, total stride 32 (Howard et al., arXiv 1704.04861).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Returns:
        Named layers that map images (N, in_channels, H, W) of any size to logits (N, num_classes).
    """
    channels = 32
    blocks = [conv_bn_relu(in_channels, channels, 3, stride=2)]
    for width, stride in V1_PAIRS:
        depthwise = conv_bn_relu(channels, channels, 3, stride, groups=channels)
        blocks.append(nn.Sequential(*depthwise, *conv_bn_relu(channels, width, 1)))
        channels = width
    classifier = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(model=nn.Sequential(*blocks), **pooled("fc", classifier)))
