"""Schedules as pure functions of training progress: the top-k mask's k, learning-rate and weight multipliers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Literal

from kd_common.checks import at_least, within
from kd_common.errors import UserError

Phase = Literal["easy", "transition", "hard"]


@dataclass(frozen=True)
class TopKSchedule:
    """Number k of surviving non-target classes of the dynamic top-k mask, a function of step / total_steps.

    Easy phase: k grows linearly from k_start to k_opt. Transition: k_opt is held. Hard phase: k grows linearly from
    k_opt to all num_classes - 1 non-target classes.

    Args:
        num_classes: Number of classes C, at least 2.
        total_steps: Length of training in steps; steps beyond it (or below 0) count as its end (or start).
        k_start: First k: a float is a fraction of C in (0, 1], rounded and kept in [1, C - 1]; an int is a count.
        k_opt: K of the transition phase, given like k_start and not below it.
        phase_ends: Two or three strictly increasing shares of training in (0, 1]: the ends of the easy and the
            transition phase, and the point where k reaches C - 1. Without the third, k reaches C - 1 at the end of
            training.

    Raises:
        UserError: If a setting is out of its range.

    References:
        Dynamic top-k mask of DeepKD, arXiv 2505.15133; the shape of the phases is this project's.
    """

    num_classes: int
    total_steps: int
    _: KW_ONLY
    k_start: int | float = 0.05
    k_opt: int | float = 0.5
    phase_ends: Sequence[float] = (0.3, 0.6)

    def __post_init__(self) -> None:
        at_least("num_classes", self.num_classes, 2)
        at_least("total_steps", self.total_steps, 1)
        if self._count("k_start", self.k_start) > self._count("k_opt", self.k_opt):
            raise UserError(f"k_start must not exceed k_opt, got k_start={self.k_start} and k_opt={self.k_opt}")
        increasing = all(a < b <= 1 for a, b in pairwise((0.0, *self.phase_ends)))
        if len(self.phase_ends) not in (2, 3) or not increasing:
            raise UserError(
                f"phase_ends must be two or three strictly increasing shares of training in (0, 1], "
                f"got {tuple(self.phase_ends)}"
            )

    def _count(self, name: str, value: int | float) -> int:
        most = self.num_classes - 1
        if isinstance(value, int):
            within(f"{name}, a count of classes,", value, f"[1, {most}]")
            return value
        within(f"{name}, a fraction of the classes,", value, "(0, 1]")
        return min(max(round(value * self.num_classes), 1), most)

    def _progress(self, step: float) -> float:
        return min(max(step / self.total_steps, 0.0), 1.0)

    def phase(self, step: float) -> Phase:
        """Return the name of the phase that the step falls in."""
        progress = self._progress(step)
        if progress < self.phase_ends[0]:
            return "easy"
        return "transition" if progress < self.phase_ends[1] else "hard"

    def __call__(self, step: float) -> int:
        """Return the number of surviving classes at a step, in [1, C - 1]."""
        progress, phase = self._progress(step), self.phase(step)
        easy_end, transition_end, full = (*self.phase_ends, 1.0)[:3]
        first, held = self._count("k_start", self.k_start), self._count("k_opt", self.k_opt)
        if phase == "easy":
            return round(first + (held - first) * progress / easy_end)
        if phase == "transition":
            return held
        most = self.num_classes - 1
        if progress >= full:
            return most
        return round(held + (most - held) * (progress - transition_end) / (full - transition_end))


class Schedule(ABC):
    """Multiplier of a learning rate (or of any weight) as a pure function of progress."""

    @abstractmethod
    def __call__(self, epoch: float, total_epochs: float) -> float:
        """Return the multiplier at a progress in epochs, fractions included.

        Args:
            epoch: Progress in epochs, >= 0.
            total_epochs: Length of training in epochs, > 0.
        """


def linear_warmup(epoch: float, warmup_epochs: float) -> float:
    """Return the warm-up factor min(epoch / warmup_epochs, 1); 1 when there is no warm-up.

    Args:
        epoch: Progress in epochs, fractions included.
        warmup_epochs: Length of the warm-up in epochs.

    Returns:
        Factor in [0, 1].
    """
    return min(max(epoch / warmup_epochs, 0.0), 1.0) if warmup_epochs > 0 else 1.0


def _warmup_from(start: float, epoch: float, warmup_epochs: float) -> float:
    return start + (1 - start) * linear_warmup(epoch, warmup_epochs)


def _check_warmup(warmup_epochs: float, warmup_start: float) -> None:
    at_least("warmup_epochs", warmup_epochs, 0)
    within("warmup_start", warmup_start, "[0, 1]")


class StepDecay(Schedule):
    """Multiplier gamma ** (number of milestones reached), after a linear warm-up.

    Args:
        milestones: Epochs at which the value is multiplied by gamma, strictly increasing.
        gamma: Factor per milestone, in (0, 1].
        warmup_epochs: Length of the linear warm-up in epochs.
        warmup_start: Multiplier at epoch 0 of a warm-up, in [0, 1].

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self, milestones: Sequence[float], gamma: float = 0.1, warmup_epochs: float = 0.0, warmup_start: float = 0.0
    ) -> None:
        _check_warmup(warmup_epochs, warmup_start)
        if any(a >= b for a, b in pairwise(milestones)):
            raise UserError(f"milestones must be strictly increasing, got {tuple(milestones)}")
        within("gamma", gamma, "(0, 1]")
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start

    def __call__(self, epoch: float, total_epochs: float) -> float:
        """Return the multiplier at an epoch; the length of training does not matter here."""
        decay = self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        return decay * _warmup_from(self.warmup_start, epoch, self.warmup_epochs)


class CosineDecay(Schedule):
    """Multiplier that falls from 1 to `final` along half a cosine, after a linear warm-up.

    Args:
        warmup_epochs: Length of the linear warm-up in epochs; the cosine starts at its end.
        final: Multiplier at the end, in [0, 1].
        warmup_start: Multiplier at epoch 0 of a warm-up, in [0, 1].

    Raises:
        UserError: If a setting is out of its range.

    References:
        SGDR, arXiv 1608.03983, equation 5 without restarts.
    """

    def __init__(self, warmup_epochs: float = 0.0, final: float = 0.0, warmup_start: float = 0.0) -> None:
        _check_warmup(warmup_epochs, warmup_start)
        within("final", final, "[0, 1]")
        self.warmup_epochs = warmup_epochs
        self.final = final
        self.warmup_start = warmup_start

    def __call__(self, epoch: float, total_epochs: float) -> float:
        """Return the multiplier at an epoch, `final` beyond the end; a run shorter than the warm-up ends within it."""
        if epoch < self.warmup_epochs:
            return _warmup_from(self.warmup_start, epoch, self.warmup_epochs)
        falling = total_epochs - self.warmup_epochs
        progress = min((epoch - self.warmup_epochs) / falling, 1.0) if falling > 0 else 1.0
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
