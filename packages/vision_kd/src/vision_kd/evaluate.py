"""``python -m vision_kd.evaluate --ckpt FILE``: top-1 and top-5 accuracy of a saved classifier."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from kd_common.cli import find_config
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


@torch.inference_mode()
def accuracy(
    model: nn.Module, loader: Iterable[tuple[dict[str, Tensor], Tensor]], num_classes: int, device: torch.device | str
) -> dict[str, float]:
    """Share of samples whose label is the first, or among the first five, of the predictions.

    Args:
        model: Images in [0, 1] to logits; put in evaluation mode.
        loader: Validation batches ``({"clean": images}, target)``.
        num_classes: Number of classes.
        device: Where to run.

    Returns:
        ``top1`` and ``top5`` (top-C with fewer than five classes), in [0, 1].
    """
    model.eval().to(device)
    metrics = {
        name: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro").to(device)
        for name, k in (("top1", 1), ("top5", 5))
    }
    for views, target in loader:
        logits = model(views["clean"].to(device)).float()
        for metric in metrics.values():
            metric.update(logits, target.to(device))
    return {name: float(metric.compute()) for name, metric in metrics.items()}
