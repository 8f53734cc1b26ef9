"""Parameter groups of plain optimizers."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups for an optimizer of `torch.optim`: matrices decay, vectors and scalars (norms, biases) do not.

    Args:
        parameters: Parameters to train.
        weight_decay: Weight decay of those with two or more axes.

    Returns:
        One group or two, none of them empty.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
