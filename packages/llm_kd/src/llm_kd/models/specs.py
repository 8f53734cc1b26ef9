"""Which models a run uses, as a configuration file states it."""

from dataclasses import dataclass, field
from typing import Literal

from kd_common.checks import at_least, within
from kd_common.errors import UserError
from kd_common.hub.language_models import EMBEDDED, model_source


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher.

    Args:
        name: Local folder, Hub name, or the embedded `smollm2-135m-instruct`.
        dtype: Precision of its weights: float32, bfloat16, float16 or float64.
        attention: Implementation of attention in transformers; Gemma 2 needs `eager`.
        cache: Folder written by `llm_kd.cache_teacher`: distil from stored distributions instead of running the
            teacher in training; None runs it.
    """

    name: str = EMBEDDED
    dtype: str = "float32"
    attention: str = "sdpa"
    cache: str | None = None

    def __post_init__(self) -> None:
        _check_attention("teacher", self.attention)

    def source(self) -> str:
        """Return the digest of its files and precision; see `kd_common.hub.language_models.model_source`."""
        return f"{model_source(self.name)} in {self.dtype}"


@dataclass(frozen=True)
class LoRASpec:
    """Low-rank adapters, of which alone the student's training then consists (`peft`).

    Args:
        rank: Rank r of the adapters, >= 1.
        alpha: Scale; the update is multiplied by alpha / rank.
        dropout: Dropout before the adapters, in [0, 1).
        targets: Names of the linear layers that get one; `all-linear` for every one but the head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        at_least("student.lora.rank", self.rank, 1)
        within("student.lora.dropout", self.dropout, "[0, 1)")


@dataclass(frozen=True)
class StudentSpec:
    """The student.

    Args:
        name: Local folder or Hub name; None starts from the teacher.
        layers: Keep so many of the teacher's decoder layers, evenly spaced with the first and the last, or `all`. A
            student with a name keeps all of its own (`llm_kd.models.depth_prune` makes one with fewer).
        dtype: Precision of the trained weights; float32 unless memory forbids it, for small updates vanish in bfloat16
            (`trainer.precision bf16-mixed` computes in bfloat16 and keeps float32 weights).
        attention: Implementation of attention in transformers.
        lora: Train low-rank adapters only; None trains all weights.

    Raises:
        UserError: If a student with a name is to be pruned.
    """

    name: str | None = None
    layers: int | Literal["all"] = "all"
    dtype: str = "float32"
    attention: str = "sdpa"
    lora: LoRASpec | None = None

    def __post_init__(self) -> None:
        _check_attention("student", self.attention)
        if self.name is not None and self.layers != "all":
            raise UserError(
                f"student.layers {self.layers} keeps layers of the teacher, but the student is {self.name}: set "
                "student.layers to all (the default configuration, made for the embedded pair, keeps 10; start from "
                "--config pairs/own for others), or prune it beforehand with llm_kd.models.depth_prune"
            )


def _check_attention(role: str, attention: str) -> None:
    """Refuse flash attention: it would let the conversations of a packed row see each other."""
    if attention.startswith("flash"):
        raise UserError(
            f"{role}.attention {attention}: rows come without an attention mask, and flash attention does not keep "
            "packed conversations apart by their positions; use sdpa or eager"
        )
