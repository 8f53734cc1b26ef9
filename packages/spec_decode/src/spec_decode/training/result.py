"""What the training of a drafter achieved."""

from dataclasses import dataclass

from kd_common.run.result import RunResult
from spec_decode.decoding.measure import Measurement


@dataclass(kw_only=True)
class Result(RunResult):
    """What the training of a drafter achieved.

    Every epoch of the history holds the validation `loss`, `tau` (teacher-forced, chain of all levels),
    `acceptance` by level and rank, and of the training `train_loss`, `seconds` and `tokens_per_second`.

    Attributes:
        tree: Tree that automatic tuning chose on this machine; empty if plain decoding is faster, None if not asked.
        measured: Held-out prompts decoded: `plain`, and `chain` with all levels; `tree` where one was chosen.
    """

    tree: tuple[int, ...] | None
    measured: dict[str, Measurement]
