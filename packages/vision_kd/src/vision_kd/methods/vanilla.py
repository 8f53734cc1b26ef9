"""Training on the labels alone, the baseline of every distillation result."""

from typing import ClassVar

from torch import Tensor

from vision_kd.methods.base import Method, Views, cross_entropy


class Vanilla(Method):
    """Cross-entropy to the labels without a teacher."""

    components: ClassVar[tuple[str, ...]] = ("task",)

    def __call__(
        self, student: Views, teacher: Views, target: Tensor, *, epoch: float = 0.0, k: int | None = None
    ) -> dict[str, Tensor]:
        """Return the cross-entropy as the only component; see `Method.__call__`."""
        return {"task": cross_entropy(student["weak"], target)}
