"""Medusa: a residual block and a head of its own per level, on the target's last hidden context."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec_decode.drafters.base import Draft, DraftContext, draft_from_levels, last_rows, tree_depth
from spec_decode.drafters.trainable import TrainableDrafter
from spec_decode.models import CausalLM, States


class ResidualBlock(nn.Module):
    """x + SiLU(linear(x)), the identity at first.

    Args:
        size: Width.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the same shape as x."""
        return x + F.silu(self.linear(x))


class Medusa(TrainableDrafter):
    """Heads that predict level i as head_i(block_i(final context of the last position the target has seen)).

    It does not see the token that follows that position, and keeps no cache.

    Args:
        depth: Levels, one block and head each.
        draft_vocab: Tokens it can propose; None means all.

    References:
        Medusa, arXiv 2401.10774 (Medusa-1).
    """

    def __init__(self, depth: int = 4, draft_vocab: int | None = None) -> None:
        super().__init__(depth, draft_vocab)

    def build(self, target: CausalLM) -> None:
        """Make the blocks, and heads that start from the target's."""
        hidden = target.shape.hidden_size
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(self.depth))
        self.heads = nn.ModuleList(nn.Linear(hidden, self.draft_tokens, bias=False) for _ in range(self.depth))
        if self.vocabulary is None:
            self.initialize_head()

    def initialize_head(self) -> None:
        """Start every head from the target's."""
        for head in self.heads:
            head.load_state_dict({"weight": self.frozen_head()})

    def level_states(self, tokens: Tensor, states: States) -> list[Tensor]:
        """Apply every head to the target's last state."""
        final = states.final[:, :-1].to(self.dtype)
        return [block(final) for block in self.blocks]

    def level_logits(self, level: int, states: Tensor) -> Tensor:
        """Return the logits through the level's own head."""
        return self.heads[level](states)

    def propose(self, context: DraftContext) -> Draft:
        """Draft all levels from the last committed position."""
        final = last_rows(context.states.final, context.counts).to(self.dtype)
        levels = [block(final) for block in list(self.blocks)[: tree_depth(context.tree)]]
        logits = torch.stack([self.level_logits(i, x) for i, x in enumerate(levels)], dim=1)
        return draft_from_levels(context, logits, self.vocabulary, self.target.vocab_size)
