"""Checks of prompts and settings before any work is done."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from kd_common.errors import UserError


def check_whole(name: str, *values: Any) -> None:
    """Raise unless the value is a whole number; 2.5 is none, and neither is True, which Python takes for 1.

    Raises:
        UserError: Naming the setting.
    """
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise UserError(f"{name} must be made of whole numbers, got {value!r}")


def check_length(max_new_tokens: int | None) -> None:
    """Raise for an invalid number of new tokens.

    Raises:
        UserError: If it is no whole number >= 1, and not None.
    """
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise UserError(f"max_new_tokens must be an int >= 1, or None to fill the context, got {max_new_tokens}")


def prompt_lists(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, vocab_size: int, context: int
) -> list[list[int]]:
    """Return the prompts as lists without padding.

    Args:
        input_ids: Prompts as lists of token ids, or int64 of shape (B, P).
        attention_mask: For a tensor only: 1 at the tokens that count, shape (B, P).
        vocab_size: Number of tokens; every token must be smaller.
        context: Prompts must be shorter.

    Raises:
        UserError: If there is no prompt, one is empty, too long or holds a token outside the vocabulary, or lists come
            with a mask.
    """
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise UserError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise UserError(f"input_ids must hold token ids, whole numbers, got {input_ids.dtype}")
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise UserError(f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {input_ids.shape}")
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError("attention_mask must hold 0 and 1: 1 at the tokens that count")
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    else:
        if attention_mask is not None:
            raise UserError("attention_mask belongs to input_ids of shape (batch, length); lists hold no padding")
        try:
            prompts = [list(map(index, row)) for row in input_ids]
        except TypeError as error:
            raise UserError(f"input_ids must be lists of token ids, one list per prompt: {error}") from error
    if not prompts:
        raise UserError("input_ids holds no prompt")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty; give at least one token, such as the start-of-text token")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, the target's context {context} leaves no room to generate; "
                "shorten it"
            )
        if not all(0 <= token < vocab_size for token in prompt):
            raise UserError(f"prompt {row} holds tokens outside the target's vocabulary [0, {vocab_size})")
    return prompts
