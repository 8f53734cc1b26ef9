"""Generations and their statistics: numbers of tokens, acceptance by level, seconds by phase."""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spec_decode.decoding.verify import Verified

PHASES = ("prefill", "draft", "target", "verify", "commit")


@dataclass(eq=False)
class Generation:
    """Generated tokens and their statistics.

    Attributes:
        sequences: Prompts and new tokens, int64 of shape (B, L), padded behind each row's end with `pad_token`.
        prompt_lengths: Tokens of each prompt.
        lengths: Tokens of each row, prompt included.
        acceptance_lengths: Per row the tokens kept from each target pass: accepted draft tokens + 1, fewer where a
            stop or a limit cut the last pass. The prefill and its token are not counted.
        tested: Number of passes, over all rows, that tested candidates at each level.
        matched: Passes in which one of them was accepted; `matched / tested` is the acceptance of the level.
        pass_sizes: Target passes by their number of nodes, absent ones included.
        timings: Seconds of each phase in `PHASES`, and of everything under "total".
    """

    sequences: Tensor
    prompt_lengths: list[int]
    lengths: list[int]
    acceptance_lengths: list[list[int]]
    tested: list[int]
    matched: list[int]
    pass_sizes: dict[int, int]
    timings: dict[str, float]

    @property
    def new_tokens(self) -> list[list[int]]:
        """New tokens of each row."""
        rows = zip(self.sequences.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [row[start:end] for row, start, end in rows]

    @property
    def tau(self) -> float:
        """Return the mean acceptance length: tokens per target pass and row, accepted + 1; 1 when no pass was made."""
        lengths = [length for row in self.acceptance_lengths for length in row]
        return sum(lengths) / len(lengths) if lengths else 1.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows after the prefill's, per second spent after the prefill."""
        tokens = sum(sum(row) for row in self.acceptance_lengths)
        return tokens / max(self.timings["total"] - self.timings["prefill"], 1e-9)


@dataclass
class Clock:
    """Timer that adds up the seconds of phases and waits for the device at every boundary."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _began: float = 0.0
    _last: float = 0.0

    def start(self) -> None:
        """Begin the first phase."""
        self._began = time.perf_counter()
        self._last = self._now()

    def stop(self, phase: str) -> float:
        """Return the end a phase, with which the next one begins; returns its seconds."""
        now = self._now()
        spent, self._last = now - self._last, now
        self.seconds[phase] += spent
        return spent

    def timings(self) -> dict[str, float]:
        """Return the seconds of each phase and, under "total", since the start."""
        return self.seconds | {"total": time.perf_counter() - self._began}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Statistics:
    """Statistics of a generation: tokens, acceptance and seconds of every pass.

    Args:
        rows: B.
        depth: Levels of the trees.
    """

    def __init__(self, rows: int, depth: int) -> None:
        self.acceptance_lengths: list[list[int]] = [[] for _ in range(rows)]
        self.tested, self.matched = torch.zeros(2, depth, dtype=torch.int64)
        self.pass_sizes: Counter[int] = Counter()

    def record(self, size: int, verified: Verified, kept: Tensor) -> None:
        """Count a pass.

        Args:
            size: Nodes of its tree.
            verified: Result of the verification.
            kept: Tokens that each row keeps, int64 of shape (B,); 0 only where a row was finished before.
        """
        self.pass_sizes[size] += 1
        for lengths, count in zip(self.acceptance_lengths, kept.tolist(), strict=True):
            if count:
                lengths.append(count)
        active = (kept > 0).unsqueeze(1)
        for total, levels in ((self.tested, verified.tested), (self.matched, verified.matched)):
            counted = (levels & active).sum(0).cpu()[: len(total)]
            total[: len(counted)] += counted
