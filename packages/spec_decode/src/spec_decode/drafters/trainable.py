"""Drafters with parameters: their target, the reduced draft vocabulary, and the interface for training.

Shapes: B rows, T tokens of a training sequence, N levels, h hidden size, C draft tokens, V tokens of the target. Row p
    of a training sequence holds the target's features at position p and token p + 1. Level i (from 0) at row p predicts
    token p + 2 + i.
"""

import inspect
from abc import abstractmethod
from dataclasses import replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_common.checks import at_least
from kd_common.errors import UserError
from spec_decode.drafters.base import Capabilities, Drafter
from spec_decode.models import CausalLM, KVCache, States
from spec_decode.models.layers import Rotation, rotation
from spec_decode.models.packed import PackedLinear, pack_linears, packable


def check_vocabulary(ids: Tensor, size: int, vocab_size: int) -> None:
    """Raise unless a mapping is an ascending selection of the target's tokens.

    Args:
        ids: Target token of each draft token, int64 of shape (C,).
        size: C the drafter was made for.
        vocab_size: V.

    Raises:
        ValueError: If it has another size, is not ascending or leaves [0, V).
    """
    if ids.dtype != torch.int64 or ids.shape != (size,):
        raise ValueError(f"the draft vocabulary must be int64 of shape ({size},), got {ids.dtype} {tuple(ids.shape)}")
    if (ids < 0).any() or (ids >= vocab_size).any() or (ids.diff() <= 0).any():
        raise ValueError(f"the draft vocabulary must hold ascending, distinct tokens of [0, {vocab_size})")


class TrainableDrafter(nn.Module, Drafter):
    """Base of the drafters that `spec_decode.fit` trains; the target's weights are shared, not owned.

    A drafter is made of its settings alone, which it keeps under their names. `bind` gives it its target and thereby
    its parameters.

    Args:
        depth: N, levels it drafts, >= 1.
        draft_vocab: C, tokens it can propose, chosen by `use_vocabulary` before training; None means all V.

    Attributes:
        depth: N.
        supervised: Levels the loss looks at.
        vocabulary: Target token of each draft token, int64 of shape (C,), -1 before it is chosen; None without.

    Raises:
        UserError: If depth is out of range.
    """

    vocabulary: Tensor | None
    capabilities = Capabilities(samples=True, confident=True)
    standalone = False

    def __init__(self, depth: int, draft_vocab: int | None) -> None:
        super().__init__()
        at_least("depth", depth, 1)
        self.depth = self.supervised = depth
        self.draft_vocab = draft_vocab
        self._head_rows: Tensor | None = None
        self._packed_rows: list[PackedLinear] = []  # in a list, so that they are no submodule: they are the target's

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor settings by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def bind(self, target: CausalLM) -> Self:
        """Make the parameters for this target, in fp32 on the target's device, and return the drafter itself.

        Raises:
            UserError: If draft_vocab is out of range.
        """
        size, known = self.draft_vocab, target.vocab_size
        if size is not None and not 1 <= size <= known:
            raise UserError(f"draft_vocab must be in [1, {known}], or null for all, got {size}")
        self._target = [target]  # in a list, so that it is no submodule: not saved, not trained, not moved
        self.capabilities = replace(self.capabilities, max_depth=self.depth, max_width=size or known)
        self.register_buffer("vocabulary", None if size is None else torch.full((size,), -1))
        self.build(target)
        return self.float().to(target.device)

    @abstractmethod
    def build(self, target: CausalLM) -> None:
        """Make the layers for a target that `bind` has just set."""

    def untrained(self) -> Self:
        """Return an untrained drafter with the same settings for the same target."""
        return type(self)(**self.settings).bind(self.target)

    @property
    def target(self) -> CausalLM:
        """Return the frozen target."""
        return self._target[0]

    def serves(self, target: CausalLM) -> bool:
        """Return whether it was built for this target."""
        return target is self.target

    @property
    def draft_tokens(self) -> int:
        """Return the number C of draft tokens."""
        return self.target.vocab_size if self.vocabulary is None else len(self.vocabulary)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    def use_vocabulary(self, ids: Tensor) -> None:
        """Set the tokens that the drafter can propose; call this once, before training.

        Raises:
            ValueError: If the drafter has the full vocabulary or the ids do not fit it.
        """
        if self.vocabulary is None:
            raise ValueError("this drafter proposes every token; set draft_vocab to reduce its vocabulary")
        check_vocabulary(ids, len(self.vocabulary), self.target.vocab_size)
        self.vocabulary = ids.to(self.vocabulary.device)
        self._forget_head_rows()
        self.initialize_head()

    def initialize_head(self) -> None:
        """Prepare the drafter's own head, if it has one, once the draft vocabulary is known."""

    def frozen_head(self) -> Tensor:
        """Return the rows of the target's LM head for the draft tokens, shape (C, h).

        Raises:
            RuntimeError: If the draft vocabulary has not been chosen or loaded.
        """
        weight = self.target.lm_head.weight
        if self.vocabulary is None:
            return weight
        if self._head_rows is None or self._head_rows.device != weight.device or self._head_rows.dtype != weight.dtype:
            if int(self.vocabulary[0]) < 0:
                raise RuntimeError("the draft vocabulary is not chosen yet; call use_vocabulary or load the drafter")
            self._head_rows = weight[self.vocabulary.to(weight.device)].detach()
        return self._head_rows

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_head_rows()

    def _forget_head_rows(self) -> None:
        """Drop the packed head, which belongs to the former vocabulary."""
        self._head_rows, self._packed_rows = None, []

    def pack(self) -> None:
        """Pack the layers; the draft tokens' rows of the target's head are packed, too, if they are read."""
        pack_linears(self)
        reads_frozen_head = type(self).level_logits is TrainableDrafter.level_logits
        if reads_frozen_head and self.vocabulary is not None and not self._packed_rows and packable(self.frozen_head()):
            self._packed_rows = [PackedLinear(self.frozen_head())]

    def weights(self) -> list[Tensor]:
        """Return all tensors, the packed head among them."""
        return [*super().weights(), *(t for rows in self._packed_rows for t in rows.buffers())]

    def frozen_logits(self, x: Tensor) -> Tensor:
        """Return the logits of shape (..., C) through the frozen head, for the few rows of a draft, shape (..., h)."""
        x = x.to(self.target.dtype)  # a drafter in training has another type
        if self._packed_rows:
            return self._packed_rows[0](x)
        if self.vocabulary is None and self.target.packed:
            return self.target.logits(x)
        return linear_in_eights(x, self.frozen_head())

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the target's frozen embeddings in the drafter's type; -1 is allowed."""
        return self.target.embed_tokens(tokens.clamp(min=0)).to(self.dtype)

    def rotation(self, positions: Tensor) -> Rotation:
        """Return the target's rotary cosines and sines in the drafter's type."""
        return rotation(positions, self.target.frequencies, self.target.rope_scale, self.dtype)

    def layer_cache(self, layers: int, batch: int, capacity: int) -> KVCache:
        """Return the cache of the drafter's own layers, which have the target's shape."""
        shape = self.target.shape
        return KVCache(
            layers, batch, capacity, shape.kv_heads, shape.head_dim, dtype=self.dtype, device=self.target.device
        )

    @abstractmethod
    def level_states(self, tokens: Tensor, states: States) -> list[Tensor]:
        """Return the states of every level in one teacher-forced pass over right-padded sequences.

        Args:
            tokens: int64 of shape (B, T).
            states: The target's states, shapes (B, T, .).

        Returns:
            N tensors whose rows are 0 .. T - 2; a level may have fewer rows, the first ones.
        """

    def level_logits(self, level: int, states: Tensor) -> Tensor:
        """Return the logits (..., C) of one level's states (..., h); by default through the frozen head."""
        weight = self.frozen_head()
        return F.linear(states.to(weight.dtype), weight)


def linear_in_eights(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight^T with the rows padded to a multiple of 8.

    MKL's fp32 kernels halve their speed at 3 or 7 rows.
    """
    flat = x.flatten(0, -2)
    padded = F.pad(flat, (0, 0, 0, -len(flat) % 8))
    return F.linear(padded, weight)[: len(flat)].unflatten(0, x.shape[:-1])
