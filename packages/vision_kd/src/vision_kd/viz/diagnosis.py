"""Diagnosis of a classifier from its logits. Shapes: N samples, C classes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

BINS = 15
"""Bins of confidence of the reliability diagram and the calibration error."""


def collect_logits(
    network: nn.Module,
    loader: Iterable[tuple[dict[str, Tensor], Tensor]],
    device: torch.device | str,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits float32 (N, C) and labels (N,) of a validation set, on the CPU.

    Args:
        network: Images to logits; put in evaluation mode.
        loader: Batches `({"clean": images}, target)`.
        device: Where to run.
        limit: Stop after so many samples.
    """
    network.eval().to(device)
    logits, targets, count = [], [], 0
    with torch.inference_mode():
        for views, target in loader:
            logits.append(network(views["clean"].to(device)).float().cpu())
            targets.append(target.cpu())
            count += len(target)
            if limit is not None and count >= limit:
                break
    return torch.cat(logits)[:limit], torch.cat(targets)[:limit]


def class_correlation(logits: Tensor) -> Tensor:
    """Return the Pearson correlation of every two classes' logits, (C, C); 0 if a class never varies."""
    return torch.corrcoef(logits.T).nan_to_num(0.0)


def class_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the share of each class's samples that are classified correctly, (C,); 0 for a class without samples."""
    return multiclass_accuracy(logits, target, num_classes=logits.shape[1], average=None)


def calibration_error(logits: Tensor, target: Tensor) -> float:
    """Return the expected calibration error.

    It is the mean gap between confidence and accuracy over `BINS` bins, weighted by samples.
    """
    return float(multiclass_calibration_error(logits.softmax(-1), target, logits.shape[1], n_bins=BINS, norm="l1"))


def reliability(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean confidence, accuracy and number of samples of every non-empty bin of confidence; shapes (b,)."""
    confidence, predicted = logits.softmax(-1).max(-1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    sums = torch.zeros(2, BINS).index_add(1, bins, torch.stack([confidence, (predicted == target).float()]))
    held = counts > 0
    means = sums[:, held] / counts[held]
    return means[0], means[1], counts[held]
