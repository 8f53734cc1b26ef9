"""Batches of token sequences, padded or packed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llm_kd.data.example import Example

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(eq=False)  # not frozen: Lightning's precision plugins replace its fields
class TokenBatch:
    """B rows of S tokens, each row one or more sequences and padding on its right.

    There is no attention mask. Causal attention never looks at what stands to the right, and transformers keeps the
    sequences of a row apart by their positions if it is given neither a mask nor a cache.

    Attributes:
        input_ids: Token ids, shape (B, S), int64.
        position_ids: Position within the sequence, shape (B, S), int64. The padding counts on from the last one:
            as a sequence of its own, it would make transformers build a mask for every batch of unequal rows.
        predict: True where the next token of the same sequence carries a loss, shape (B, S). It is aligned with the
            hidden state that predicts that token, hence already shifted.
        labels: The next token where `predict`, else -100, shape (B, S), int64.
        keys: Keys of the sequences in reading order: row after row, in each from left to right. The rows of
            `hidden[predict]` are the supervised tokens of the first, then of the second, and so on.
        prompts: Tokens of the sequences up to their last answer, in the same order; those of sequences without an
            answer, too, so that a student can be asked to write it.
    """

    input_ids: Tensor
    position_ids: Tensor
    predict: Tensor
    labels: Tensor
    keys: list[str]
    prompts: list[list[int]]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Move the tensors of the batch to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predict=self.predict.to(device),
            labels=self.labels.to(device),
        )


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> TokenBatch:
    """Write examples into the rows of a batch as long as its longest row.

    Examples without a supervised token stand in their row but not in `keys`, those without a prompt not in
    `prompts`; a rank that has no example left computes on `llm_kd.data.example.nothing`.

    Args:
        rows: The examples of every row, at least one each.
        pad_id: Token that fills up the rows.
    """
    length = max(sum(len(example.input_ids) for example in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            input_ids[number, start:end] = torch.tensor(example.input_ids)
            position_ids[number, start:] = torch.arange(length - start)
            supervised[number, start:end] = torch.tensor(example.loss_mask)
            start = end
    # The first token of a sequence carries no loss, so the shift never reaches across from the sequence before it.
    predict = torch.nn.functional.pad(supervised[:, 1:], (0, 1))
    examples = [example for row in rows for example in row]
    return TokenBatch(
        input_ids,
        position_ids,
        predict,
        labels=input_ids.roll(-1, dims=1).where(predict, IGNORED),
        keys=[example.key for example in examples if any(example.loss_mask)],
        prompts=[example.input_ids[: example.prompt_length] for example in examples if example.prompt_length],
    )


def pack(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack by first fit: a sequence goes into the first row that has space for it, else into a new row.

    Args:
        lengths: Tokens of every sequence, each at most `capacity`.
        order: The order in which sequences are placed.
        capacity: Tokens of a row.

    Returns:
        Numbers of the sequences of every row.
    """
    rows: list[list[int]] = []
    free = np.full(len(order), capacity)
    for number in order:
        place = int((free[: len(rows) + 1] >= lengths[number]).argmax())  # a new row always has room
        if place == len(rows):
            rows.append([])
        rows[place].append(number)
        free[place] -= lengths[number]
    return rows
