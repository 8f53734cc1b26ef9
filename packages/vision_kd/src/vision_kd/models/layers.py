"""Layers that several network families share."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a bias-free convolution that keeps the map size at stride 1."""
    padding = kernel // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU in sequence."""
    layer = conv(in_channels, out_channels, kernel, stride, groups)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def relu(x: Tensor) -> Tensor:
    """Return an in-place ReLU.

    It is safe after batch norm and after a sum, whose backward passes do not read their output.
    """
    return F.relu(x, inplace=True)


def pooled(name: str, classifier: nn.Module) -> dict[str, nn.Module]:
    """Return a global average pool in front of a classifier, ready to end an `nn.Sequential`.

    Args:
        name: Name of the classifier, which becomes its state-dict key.
        classifier: Maps features (N, C) to logits (N, num_classes).

    Returns:
        Named layers that map (N, C, H, W) to logits (N, num_classes).
    """
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), name: classifier}


def small_linear(features: int, num_classes: int) -> nn.Linear:
    """Return a linear classifier drawn from N(0, 0.01^2) with zero bias, so that the first logits are nearly equal."""
    layer = nn.Linear(features, num_classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def init_he_(network: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out) and zero its bias (He et al., arXiv 1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
