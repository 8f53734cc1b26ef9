"""Spec-k verification."""

import random
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from llm_kd.selection.acceptance import token_weights
from llm_kd.selection.base import Selection
from llm_kd.selection.speck_expected import SpecKExpected


class SpecK(SpecKExpected):
    """Weight 1 where the teacher accepts one of k random proposals of the student, else beta.

    The random numbers are a function of the seed, the rank and the number of training batches seen. That number is the
    state, so a resumed run draws the same numbers as an uninterrupted one. Validation does not advance it: all its
    batches use the same numbers.

    Args:
        k: Number of proposals per token, >= 1.
        beta: Weight of a rejected token, in [0, 1].
        seed: Seed of the random numbers; None takes the run's.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        SelecTKD, arXiv 2510.24021; see `llm_kd.selection.acceptance.speck_accept_probability`.
    """

    def __init__(self, k: int = 5, beta: float = 0.01, seed: int | None = None) -> None:
        super().__init__(k, beta)
        self.seed = seed
        self.batches = 0

    def draw(self, num_rows: int, device: torch.device) -> Tensor:
        """Return the uniform random numbers in [0, 1), shape (num_rows,)."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # The three numbers are hashed, because neighbouring seeds must not give neighbouring streams.
        seed = random.Random(f"{self.seed}/{rank}/{self.batches}").getrandbits(63)
        self.batches += self.training
        return torch.rand(num_rows, generator=torch.Generator(device).manual_seed(seed), device=device)

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return weights 1 and beta, by one coin per token.

        Raises:
            ValueError: If there is no noise.
        """
        if noise is None:
            raise ValueError("Spec-k is random: pass the numbers of draw(), or use SpecKExpected")
        accepted = (~(noise >= score)).to(score.dtype)  # NaN is accepted, so that the loss shows it
        return Selection(token_weights(accepted, self.beta), accepted)

    def get_extra_state(self) -> dict[str, int]:
        """Return the state for a checkpoint: the number of training batches seen."""
        return {"batches": self.batches}

    def set_extra_state(self, state: Any) -> None:
        """Restore the state of `get_extra_state`."""
        self.batches = state["batches"]
