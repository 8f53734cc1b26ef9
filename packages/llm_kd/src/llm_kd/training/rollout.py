"""Where the responses of a training batch come from: the data, the student itself, or its earlier responses."""

import random
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from kd_common.checks import at_least, within
from kd_common.sampling import SamplingParams
from llm_kd.data.example import Example

Source = Literal["dataset", "generate", "replay"]


class Rollout(ABC):
    """A rule that chooses, batch by batch, where the responses come from.

    Attributes:
        generates: Whether it ever asks the student to write, which a stored teacher cannot follow.
        reads_answers: Whether it ever asks for the responses of the data.
        sampling: How the student writes; its temperature is neither the loss's nor the verification's.
    """

    generates: ClassVar[bool] = True
    reads_answers: bool = True
    sampling: SamplingParams

    @abstractmethod
    def choose(self, draw: float, progress: float) -> Source:
        """Source of a batch.

        Args:
            draw: Uniform random number in [0, 1), the same on every rank.
            progress: Share of training done, in [0, 1].
        """

    def keep(self, examples: list[Example]) -> None:  # noqa: B027  (doing nothing is most rules' answer)
        """Remember what the student has written."""

    def replay(self, count: int, rng: random.Random) -> list[Example]:
        """Earlier responses, asked for after `choose` said so; only rules with a memory have any."""
        return []

    def on_validation(self, loss: float) -> None:  # noqa: B027
        """Follow the validation loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore `state_dict`."""


class OffPolicy(Rollout):
    """Always the responses of the data, which a person or the teacher wrote."""

    generates = False
    sampling = SamplingParams()

    def choose(self, draw: float, progress: float) -> Source:
        """Take the responses of the data."""
        return "dataset"


class OnPolicy(Rollout):
    """The student's own responses for a share lambda of the batches, the data's for the others.

    Args:
        fraction: lambda, in [0, 1]; 1 is purely on-policy.
        sampling: How the student writes.

    Raises:
        UserError: If the fraction is outside [0, 1].

    References:
        Generalised knowledge distillation, arXiv 2306.13649, algorithm 1.
    """

    def __init__(self, fraction: float = 1.0, sampling: SamplingParams | None = None) -> None:
        within("fraction", fraction, "[0, 1]")
        self.fraction = fraction
        self.reads_answers = fraction < 1
        self.sampling = sampling or SamplingParams()

    def choose(self, draw: float, progress: float) -> Source:
        """Choose the student with probability lambda, else the data."""
        return "generate" if draw < self.fraction else "dataset"


class AdaptiveReplay(Rollout):
    """DistiLLM's adaptive off-policy schedule: student responses as far as they are needed, written seldom, used often.

    A threshold phi, 0 at first, rises by `step` whenever a validation loss is at least `tolerance` above the one
    before. With a uniform r: the student writes, and its responses are kept, if r < phi (1 - progress), or if
    r < phi while the memory is not full; else, if r < phi, responses are taken from the memory; else from the data. The
    loss followed is the validation's KL to the teacher.

    Args:
        capacity: Responses remembered per rank, >= 1; the oldest leave first.
        step: Rise of phi, in (0, 1].
        tolerance: Rise of the validation loss, in nats, that raises phi; negative asks for a fall to leave phi alone.
        sampling: How the student writes.

    Raises:
        UserError: If a setting is out of its range.

    References:
        DistiLLM, arXiv 2402.03898, section 3.2.
    """

    def __init__(
        self, capacity: int = 1000, step: float = 0.1, tolerance: float = 0.1, sampling: SamplingParams | None = None
    ) -> None:
        at_least("capacity", capacity, 1)
        within("step", step, "(0, 1]")
        self.capacity = capacity
        self.step = step
        self.tolerance = tolerance
        self.sampling = sampling or SamplingParams()
        self.threshold = 0.0
        self.previous_loss: float | None = None
        self.memory: list[Example] = []

    def choose(self, draw: float, progress: float) -> Source:
        """Choose by the threshold; the class explains the rule."""
        if draw >= self.threshold:
            return "dataset"
        full = len(self.memory) >= self.capacity
        return "replay" if full and draw >= self.threshold * (1 - progress) else "generate"

    def keep(self, examples: list[Example]) -> None:
        """Remember responses."""
        self.memory = [*self.memory, *examples][-self.capacity :]

    def replay(self, count: int, rng: random.Random) -> list[Example]:
        """Draw `count` remembered responses, fewer if there are fewer."""
        return rng.sample(self.memory, min(count, len(self.memory)))

    def on_validation(self, loss: float) -> None:
        """Raise phi if the loss has risen."""
        if self.previous_loss is not None and loss >= self.previous_loss + self.tolerance:
            self.threshold = min(self.threshold + self.step, 1.0)
        self.previous_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Return the threshold, the last validation loss and the stored responses."""
        memory = [{k: v for k, v in asdict(example).items() if k != "key"} for example in self.memory]
        return {"threshold": self.threshold, "previous_loss": self.previous_loss, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.threshold, self.previous_loss = state["threshold"], state["previous_loss"]
        self.memory = [Example(**example) for example in state["memory"]]
