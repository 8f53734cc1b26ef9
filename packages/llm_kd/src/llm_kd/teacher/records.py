"""Byte layout of a stored token: its id, K ids, K log-probabilities, the tail mass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_common.checks import one_of, within
from kd_common.errors import UserError
from llm_kd.selection.acceptance import TruncatedDistribution

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class RecordLayout:
    """Converter between rows of a truncated distribution and bytes; ids take the smallest integer type that holds V.

    Rounding to the storage precision keeps the rank order: it is monotone, and equal values keep their stored order.
    Log-probabilities below the smallest finite number are raised to it.

    Args:
        vocab_size: Number V of tokens, in [1, 2**31 - 1].
        size: Number K of stored tokens, in [1, V].
        dtype: Precision of the log-probabilities: float16, bfloat16 or float32. The tail mass is float32.

    Raises:
        UserError: If a setting is out of its range.
    """

    vocab_size: int
    size: int
    dtype: str

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size < 2**31:
            raise UserError(f"vocab_size must lie in [1, 2**31 - 1], got {self.vocab_size}")
        within("size", self.size, f"[1, {self.vocab_size}]")
        one_of("dtype", self.dtype, DTYPES)

    @property
    def id_dtype(self) -> torch.dtype:
        """Integer type of token ids."""
        fitting = (dtype for dtype in (torch.uint8, torch.uint16) if self.vocab_size - 1 <= torch.iinfo(dtype).max)
        return next(fitting, torch.int32)

    @property
    def bytes_per_token(self) -> int:
        """Size of a record in bytes."""
        return sum(self._widths)

    @property
    def _widths(self) -> list[int]:
        width = self.id_dtype.itemsize
        return [width, self.size * width, self.size * DTYPES[self.dtype].itemsize, 4]

    def pack(self, tokens: Tensor, distribution: TruncatedDistribution) -> Tensor:
        """Return the bytes of N records.

        Args:
            tokens: Ids of the supervised tokens, shape (N,).
            distribution: Distribution of the teacher before each token, N rows.

        Returns:
            Shape (N, bytes_per_token), uint8, on the CPU.
        """
        dtype = DTYPES[self.dtype]
        columns = (
            tokens[:, None].cpu().to(self.id_dtype),
            distribution.indices.cpu().to(self.id_dtype),
            distribution.log_probs.cpu().clamp(min=torch.finfo(dtype).min).to(dtype),
            distribution.tail_mass[:, None].cpu().float(),
        )
        return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)

    def unpack(self, records: Tensor) -> tuple[Tensor, TruncatedDistribution]:
        """Return the supervised tokens (int64) and distributions (ids in int32) of N records (N, bytes_per_token)."""
        # The slice is always copied: a view of wider numbers must start at a multiple of their size, and a single row
        # is contiguous.
        tokens, indices, log_probs, tail_mass = (
            column.clone(memory_format=torch.contiguous_format).view(dtype)
            for column, dtype in zip(
                records.split(self._widths, dim=1),
                (self.id_dtype, self.id_dtype, DTYPES[self.dtype], torch.float32),
                strict=True,
            )
        )
        distribution = TruncatedDistribution(
            log_probs, indices.to(torch.int32), tail_mass[:, 0], self.vocab_size, check=False
        )
        return tokens[:, 0].to(torch.int64), distribution
