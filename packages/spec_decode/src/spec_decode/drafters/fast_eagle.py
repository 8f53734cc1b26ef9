"""FastEagle: a cascade of decoder layers that drafts all its levels in one pass."""

from typing import Any

import torch
from torch import Tensor, nn

from kd_common.checks import at_least
from spec_decode.drafters.base import (
    Draft,
    DraftContext,
    draft_along_backbone,
    draft_from_levels,
    last_rows,
    tree_depth,
)
from spec_decode.drafters.trainable import TrainableDrafter
from spec_decode.models import CausalLM, DecoderLayer, DecodingPass, KVCache, RMSNorm, States
from spec_decode.models.layers import Attend, causal_attention


class FastEagle(TrainableDrafter):
    """x_p = join(fuse(features_p), embedding of token p + 1); h_i = layer_i(h_{i-1}); level i = head(norm_i(h_i)).

    Every layer has its own parameters and its own key-value cache over committed positions. A draft is one pass over
    the positions committed since the last one, and nothing speculative ever enters a cache. The head is the target's.

    Args:
        depth: Levels N, one layer each.
        stem: Layers before the first level, which predict nothing themselves (beyond the paper; 0 is the paper's).
        sequential: Let every level but the first see the token drafted above it, too, as Hydra's heads do, behind its
            layer: h_i + W silu(U [h_i, embedding]) (beyond the paper). The cascade and its caches stay as they are.
        draft_vocab: Tokens it can propose; None means all.
        from_target: Start as the target's last layers: with their weights and norm, reading its high features. Three
            layers then begin as the target's own last three, so that the cascade has states to start from that its
            head can read. False starts at random.

    Raises:
        UserError: If depth or stem is out of range.

    References:
        FastEagle, arXiv 2509.20416; sequential heads: Hydra, arXiv 2402.05109.
    """

    def __init__(
        self,
        depth: int = 7,
        stem: int = 0,
        sequential: bool = False,
        draft_vocab: int | None = None,
        from_target: bool = True,
    ) -> None:
        super().__init__(depth, draft_vocab)
        at_least("stem", stem, 0)
        self.stem, self.sequential, self.from_target = stem, sequential, from_target

    def build(self, target: CausalLM) -> None:
        """Make the cascade, which starts from the target's last layers if the setting says so."""
        shape = target.shape
        self.fuse = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.join = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(self.stem + self.depth))
        self.norms = nn.ModuleList(RMSNorm(shape.hidden_size, shape.norm_eps) for _ in range(self.depth))
        self.links = nn.ModuleList(_Link(shape.hidden_size) for _ in range(self.depth - 1 if self.sequential else 0))
        if self.from_target:
            for layer, source in zip(reversed(self.layers), reversed(target.layers), strict=False):
                layer.load_state_dict(source.state_dict())
            for norm in self.norms:
                norm.load_state_dict(target.norm.state_dict())
            with torch.no_grad():
                self.fuse.weight.zero_()[:, 2 * shape.hidden_size :].fill_diagonal_(1)
                self.join.weight[:, : shape.hidden_size].zero_().fill_diagonal_(1)

    def _cascade(self, features: Tensor, next_tokens: Tensor, positions: Tensor, attends: list[Attend]) -> list[Tensor]:
        """Return the output of the level layers among the first `len(attends)` layers, each of shape (B, m, h)."""
        x = self.join(torch.cat([self.fuse(features.to(self.dtype)), self.embed(next_tokens)], dim=-1))
        by = self.rotation(positions)
        outputs = []
        for layer, attend in zip(self.layers, attends, strict=False):
            x = layer(x, by, attend)
            outputs.append(x)
        return outputs[self.stem :]

    def _context(self, level: int, x: Tensor, token: Tensor) -> Tensor:
        """Return the head's input for a level's output x (..., h), drafted behind `token`, int64 of shape (...)."""
        if self.links and level:
            x = x + self.links[level - 1](torch.cat([x, self.embed(token)], dim=-1))
        return self.norms[level](x)

    def level_states(self, tokens: Tensor, states: States) -> list[Tensor]:
        """Compute all levels in one causal pass; level i has i rows fewer, as their tokens lie beyond the sequence."""
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).unsqueeze(0)
        attends = [causal_attention()] * len(self.layers)
        outputs = self._cascade(states.features[:, :-1], tokens[:, 1:], positions, attends)
        within = enumerate(outputs[: tokens.shape[1] - 1])
        return [self._context(i, x[:, : x.shape[1] - i], tokens[:, 1 + i :]) for i, x in within]

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return one cache with a layer per layer."""
        return self.layer_cache(len(self.layers), batch, capacity)

    def propose(self, context: DraftContext) -> Draft:
        """Return one pass over the newly committed positions; the last of each row predicts every level."""
        cache: KVCache = context.cache
        shape = self.target.shape
        this = DecodingPass.run(cache, context.next_tokens.shape[1], groups=shape.heads // shape.kv_heads)
        attends = [this.attend(i) for i in range(self.stem + tree_depth(context.tree))]
        outputs = self._cascade(context.states.features, context.next_tokens, this.positions, attends)
        cache.lengths = cache.lengths + context.counts
        last = [last_rows(x, context.counts) for x in outputs]
        if not self.links:
            together = torch.stack([self._context(level, x, context.root) for level, x in enumerate(last)], dim=1)
            return draft_from_levels(context, self.frozen_logits(together), self.vocabulary, self.target.vocab_size)
        below = iter(range(1, len(last)))

        def advance(token: Tensor) -> Tensor:
            level = next(below)
            return self.frozen_logits(self._context(level, last[level], token))

        first = self.frozen_logits(self._context(0, last[0], context.root))
        return draft_along_backbone(context, first, advance, self.vocabulary, self.target.vocab_size)


class _Link(nn.Sequential):
    """Adds W silu(U [h, e]) of shape (..., h); W starts at zero, so that nothing changes at first."""

    def __init__(self, size: int) -> None:
        last = nn.Linear(size, size, bias=False)
        nn.init.zeros_(last.weight)
        super().__init__(nn.Linear(2 * size, size, bias=False), nn.SiLU(), last)
