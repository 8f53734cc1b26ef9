"""What a run achieved, for tables, comparisons and notebooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import nn

Mode = Literal["max", "min"]


def best_epoch(history: Sequence[dict[str, Any]], metric: str, mode: Mode) -> dict[str, Any]:
    """Return the best validation of a run; of equal ones, the first.

    Args:
        history: Metrics of every validation; at least one.
        metric: Name of the metric that validations are compared by.
        mode: `max` if a larger value is better, `min` if a smaller one is.
    """
    return {"max": max, "min": min}[mode](history, key=lambda epoch: epoch[metric])


def count_parameters(module: nn.Module) -> int:
    """Return the number of scalar parameters, trainable or not; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(kw_only=True)
class RunResult:
    """What a run achieved.

    Attributes:
        history: Metrics of every validation, in order; at least one.
        metric: Name of the metric that validations are compared by.
        mode: `max` if a larger value of it is better, `min` if a smaller one is.
        parameters: Number of parameters by model.
        run_dir: Folder of checkpoints, logs and the resolved configuration; None if nothing was written.
    """

    history: list[dict[str, Any]]
    metric: str
    mode: Mode
    parameters: dict[str, int]
    run_dir: Path | None

    @property
    def last(self) -> dict[str, Any]:
        """Return the metrics of the last validation."""
        return self.history[-1]

    @property
    def best(self) -> dict[str, Any]:
        """Return the metrics of the best validation. It was chosen on the validation data, so it is optimistic."""
        return best_epoch(self.history, self.metric, self.mode)

    @property
    def seconds_per_epoch(self) -> float:
        """Return the mean training time between validations."""
        return fmean(epoch["seconds"] for epoch in self.history)
