"""Output of a teacher for N tokens: hidden states before its head, or a stored truncated distribution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_common.errors import UserError
from llm_kd.head.linear import LMHead, Projection, rows_per_chunk
from llm_kd.selection.acceptance import TruncatedDistribution

# Bytes for logits, log-probabilities, the masked copy in float32, ranks of ties in int64, and a few masks.
BYTES_PER_LOGIT = 24


@dataclass(frozen=True)
class TeacherHiddenStates:
    """Output of an online teacher: hidden states before the head, and the head itself.

    Attributes:
        hidden: Shape (N, H').
        head: The teacher's output layer.
    """

    hidden: Tensor
    head: LMHead

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Tensor | slice) -> "TeacherHiddenStates":
        """Select rows by a slice, indices or booleans."""
        return TeacherHiddenStates(self.hidden[rows], self.head)


TeacherOutput = TeacherHiddenStates | TruncatedDistribution
"""Teacher output of N rows in either form, in the order of the student's rows."""


@torch.no_grad()
def truncate(teacher_output: TeacherHiddenStates, size: int, vocab_size: int) -> TruncatedDistribution:
    """Return the `size` most likely tokens of every row, chunk by chunk.

    Args:
        teacher_output: N rows of a teacher.
        size: K, in [1, vocab_size].
        vocab_size: Number V of tokens; rows of the head beyond it are padding and are left out.

    Returns:
        N rows, on the device of the teacher's output, log-probabilities in at least float32.

    Raises:
        UserError: If a size is out of range or a logit is NaN or +inf.
    """
    if vocab_size > len(teacher_output.head.weight):
        raise UserError(
            f"vocab_size={vocab_size} exceeds the {len(teacher_output.head.weight)} rows of the teacher's head"
        )
    teacher = Projection(teacher_output.hidden, teacher_output.head, vocab_size)
    chunk = rows_per_chunk(teacher, BYTES_PER_LOGIT)
    rows = torch.arange(len(teacher_output), device=teacher_output.hidden.device)
    return TruncatedDistribution.cat(
        [TruncatedDistribution.from_logits(teacher.logits(part), size) for part in rows.split(chunk)]
    )
