"""Base class of teachers, which give an output for the supervised tokens of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_kd.data.batch import TokenBatch
from llm_kd.head import LMHead, TeacherOutput


class TeacherBackbone(Protocol):
    """Module that turns ids and positions, both (B, S), into hidden states (B, S, H'), and has an output layer."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, /) -> Tensor:
        """Return the hidden states before the head."""

    def lm_head(self) -> LMHead:
        """Return the output layer."""

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that decide on the teacher's output besides its weights."""

    def eval(self) -> nn.Module:
        """Set evaluation mode."""

    def requires_grad_(self, requires_grad: bool = True, /) -> nn.Module:
        """Set whether parameters take gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return all weights by name."""

    def to(self, device: torch.device | str, /) -> nn.Module:
        """Move to a device."""


class Teacher(ABC):
    """Interface of teachers, which give the teacher's part of the loss.

    It is deliberately no `nn.Module`: a teacher belongs in no checkpoint, optimizer or DDP bucket of the student.
    """

    @abstractmethod
    def output(self, batch: TokenBatch) -> TeacherOutput:
        """Return the teacher's rows of the supervised tokens.

        Args:
            batch: B sequences, or rows of packed sequences.

        Returns:
            One row for each true entry of `batch.predict`, in row-major order, on the batch's device.
        """

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the teacher's tensors to a device and return the teacher."""
        return self


def supervised_counts(batch: TokenBatch) -> list[int]:
    """Return the number of supervised tokens of each example of a batch, in the order of `batch.keys`.

    Raises:
        ValueError: If the batch does not hold as many supervised sequences as keys.
    """
    sequence = (batch.position_ids.flatten() == 0).cumsum(dim=0)
    counts = sequence[batch.predict.flatten()].bincount()
    counts = counts[counts > 0]  # some sequences have no supervised token
    if len(counts) != len(batch.keys):
        raise ValueError(
            f"the batch has {len(batch.keys)} keys but {len(counts)} sequences with supervised tokens; every example "
            "needs one key and at least one supervised token"
        )
    return counts.tolist()
