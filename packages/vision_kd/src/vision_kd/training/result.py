"""What a vision run achieved."""

from dataclasses import dataclass
from typing import Any, Optional

from kd_common.run.result import RunResult


@dataclass(kw_only=True)
class Result(RunResult):
    """What a vision run achieved: validation metrics (`top1`, `top5` and `loss`, or `AP`, `AP50` ...).

    Every epoch of the history also holds the training `seconds`, and the vector GSNR of each component
    (`gsnr/task` ...) where it was measured.

    Attributes:
        teacher: Metrics of the teacher before training, and how it was obtained; empty without a teacher.
        k: Number of classes that survive the mask at the last update; None without a mask.
        alone: Result of the same student trained on the labels alone; None unless asked for.
    """

    teacher: dict[str, Any]
    k: int | None
    alone: Optional["Result"] = None

    @property
    def gsnr(self) -> dict[str, float]:
        """Vector GSNR per component in the last epoch; empty when it was not measured."""
        return {key.removeprefix("gsnr/"): value for key, value in self.last.items() if key.startswith("gsnr/")}
