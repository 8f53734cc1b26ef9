"""Metrics of classifiers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from kd_common.errors import UserError


def accuracy(
    model: nn.Module, loader: Iterable[tuple[dict[str, Tensor], Tensor]], num_classes: int, device: torch.device | str
) -> dict[str, float]:
    """Share of samples whose label is the first, or among the first five, of the predictions.

    Args:
        model: Images in [0, 1] to logits; put in evaluation mode.
        loader: Validation batches `({"clean": images}, target)`.
        num_classes: Number of classes.
        device: Where to run.

    Returns:
        `top1` and `top5` (top-C with fewer than five classes), in [0, 1].

    Raises:
        UserError: If a logit is NaN, of which the metrics would make the first class.
    """
    model.eval().to(device)  # outside inference mode, which would leave weights that cannot be trained
    metrics = {
        name: MulticlassAccuracy(
            num_classes,
            top_k=min(k, num_classes),
            average="micro",
            sync_on_compute=False,  # one process may ask alone
        ).to(device)
        for name, k in (("top1", 1), ("top5", 5))
    }
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for views, target in loader:
            logits = model(views["clean"].to(device)).float()
            wrong += logits.isnan().any(1).sum()
            for metric in metrics.values():
                metric.update(logits, target.to(device))
    if wrong:
        raise UserError(f"{int(wrong)} images have logits that are NaN: the weights are damaged, or too large")
    return {name: float(metric.compute()) for name, metric in metrics.items()}
