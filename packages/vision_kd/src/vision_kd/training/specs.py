"""Plain settings that configurations fill in: the dynamic mask and the teacher."""

from dataclasses import dataclass, fields

from kd_common.checks import at_least, positive
from vision_kd.models import ModelSpec


@dataclass(frozen=True)
class DynamicTopK:
    """Dynamic top-k mask; see `kd_common.schedules.TopKSchedule`.

    Attributes:
        k_start: Surviving non-target classes at the start: a fraction of the classes (float) or a count (int).
        k_opt: The same for the transition phase.
        phase_ends: Ends of the easy and the transition phase as shares of the run, increasing; an optional third
            entry is where all classes are reached (default: at the end).
    """

    k_start: int | float = 0.05
    k_opt: int | float = 0.5
    phase_ends: tuple[float, ...] = (0.3, 0.6)


@dataclass(frozen=True)
class TeacherSpec(ModelSpec):
    """A teacher: which network, and where its weights come from; name to std as in `vision_kd.models.ModelSpec`.

    Weights are taken from `checkpoint`, else from the library the network comes from (`pretrained`), else from the
    cache, else the teacher is trained on the labels of the run's own data with the settings below and cached.

    Attributes:
        epochs: Length of training when it has to be trained.
        learning_rate: Its peak learning rate (cosine schedule, SGD).
        weight_decay: Its weight decay.
        warmup_epochs: Length of its linear warm-up from 0.
        clip_norm: Largest norm of its gradient; None does not clip.
        seed: Its seed; independent of the student's, so that all seeds of a comparison share one teacher.

    Raises:
        UserError: If a setting of the training is out of range.
    """

    epochs: int = 30
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("weight_decay", 0), ("warmup_epochs", 0)):
            at_least(f"model.teacher.{name}", getattr(self, name), least)
        for name in ("learning_rate", "clip_norm"):
            if (value := getattr(self, name)) is not None:
                positive(f"model.teacher.{name}", value)

    @property
    def model(self) -> ModelSpec:
        """Return the network alone."""
        return ModelSpec(**{field.name: getattr(self, field.name) for field in fields(ModelSpec)})
