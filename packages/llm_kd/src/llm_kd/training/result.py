"""What a language run achieved."""

from dataclasses import dataclass

from kd_common.run.result import RunResult
from llm_kd.evaluation.answers import Answers


@dataclass(kw_only=True)
class Result(RunResult):
    """What a language run achieved: validation means `nll`, `kl`, `agreement`, `tar` ...

    Every validation of the history also holds `train_loss`, `train_tar`, `seconds` and `tokens_per_second`.

    Attributes:
        before: Validation means of the student before training.
        answers: The student's greedy answers `before` and `after` training with their ROUGE-L, and those of the
            `teacher` where not all references are its own; empty if none were asked for.
        peak_memory_gib: Largest memory of the process (CPU) or the device (GPU).
    """

    before: dict[str, float]
    answers: dict[str, Answers]
    peak_memory_gib: float
