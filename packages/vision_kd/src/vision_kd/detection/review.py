"""Distillation of FPN maps with ReviewKD (Chen et al., arXiv 2104.09044)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_common.functional.logits import at_least_fp32

POOLED_SIZES = (4, 2, 1)


class AttentionFusion(nn.Module):
    """A student map, mixed with the fused map of the next deeper level by an attention map for each of the two.

    Args:
        channels: Channels of the student map.
        middle: Channels inside.
        out: Channels of the teacher map.
        fuse: Whether there is a deeper level.

    References:
        Attention based fusion, arXiv 2104.09044, section 3.3.
    """

    def __init__(self, channels: int, middle: int, out: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuse else None
        self.expand = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))

    def forward(self, student: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to compare with the teacher's, and the one to pass to the next shallower level.

        Args:
            student: Map (N, channels, H, W).
            deeper: Fused map (N, middle, h, w) of the deeper level; None at the deepest.

        Returns:
            (N, out, H, W) and (N, middle, H, W).
        """
        fused = self.reduce(student)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            own, other = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid().split(1, dim=1)
            fused = own * fused + other * deeper
        return self.expand(fused), fused


class ReviewFusion(nn.Module):
    """Chain of fusions over an FPN, from the deepest level to the shallowest.

    Args:
        levels: Number of levels.
        channels: Channels of the student's maps.
        out: Channels of the teacher's maps.
        middle: Channels inside.
    """

    def __init__(self, levels: int, channels: int, out: int, middle: int) -> None:
        super().__init__()
        self.fusions = nn.ModuleList(
            AttentionFusion(channels, middle, out, fuse=level < levels - 1) for level in range(levels)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps to compare with the teacher's; both lists go from the shallowest level to the deepest."""
        results: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, student in zip(reversed(self.fusions), reversed(features), strict=True):
            result, deeper = fusion(student, deeper)
            results.append(result)
        return results[::-1]


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two maps at full size and pooled to 4 x 4, 2 x 2 and 1 x 1, a scalar.

    The terms have weights 1, 1/2, 1/4 and 1/8, normalised to sum to 1. A pooled size not below the map's height is left
    out.

    Args:
        student: Map (N, C, H, W).
        teacher: Map of the same shape.

    Returns:
        The distance in at least float32.

    Raises:
        ValueError: If the shapes differ.

    References:
        Hierarchical context loss, arXiv 2104.09044, section 3.3.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"maps of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student, teacher = at_least_fp32(student), at_least_fp32(teacher)
    distance, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in POOLED_SIZES:
        if size >= student.shape[-2]:
            continue
        weight /= 2
        distance = distance + weight * F.mse_loss(
            F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
        )
        total += weight
    return distance / total


def review_distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the sum over the levels of `pyramid_distance`."""
    return torch.stack([pyramid_distance(student[level], teacher[level]) for level in student]).sum()
