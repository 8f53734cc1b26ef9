"""Loss surfaces around a solution along filter-normalised directions.

Reference: Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913, section 4.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Directions = dict[str, Tensor]


def filter_direction(parameters: Mapping[str, Tensor], generator: torch.Generator) -> Directions:
    """Return a random direction with filters as long as the network's.

    Args:
        parameters: Parameters by name; a filter is a slice along the first axis.
        generator: Source of the draws, on the CPU, so that networks of one architecture can share a direction.

    Returns:
        A tensor of the same shape per parameter; zero for biases and norms (fewer than two axes), as in the paper.
    """
    direction = {}
    for name, weight in parameters.items():
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
        if weight.ndim < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        scale = weight.flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1).clamp(min=1e-12)
        direction[name] = draw * scale.view(-1, *[1] * (weight.ndim - 1))
    return direction


@torch.no_grad()
def loss_surface(
    network: nn.Module,
    directions: Sequence[Directions],
    offsets: Tensor,
    images: Tensor,
    target: Tensor,
    batch_size: int = 256,
) -> Tensor:
    """Return the mean cross-entropy at theta + a d_1 + b d_2.

    The network is put in evaluation mode; its parameters are not touched.

    Args:
        network: Images to logits.
        directions: d_1 and d_2.
        offsets: Values of a and of b, shape (S,).
        images: Images, shape (N, C, H, W).
        target: Labels, int64 of shape (N,).
        batch_size: Images at once.

    Returns:
        float32 of shape (S, S), a along the first axis.
    """
    network.eval()
    parameters = dict(network.named_parameters())
    surface = torch.zeros(len(offsets), len(offsets))
    for i, a in enumerate(offsets.tolist()):
        for j, b in enumerate(offsets.tolist()):
            moved = {name: p + a * directions[0][name] + b * directions[1][name] for name, p in parameters.items()}
            total = sum(
                float(F.cross_entropy(functional_call(network, moved, (x,)).float(), y, reduction="sum"))
                for x, y in zip(images.split(batch_size), target.split(batch_size), strict=True)
            )
            surface[i, j] = total / len(target)
    return surface
