"""EAGLE-3: one layer that runs autoregressively on its own output, in training as in decoding (training-time test)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spec_decode.drafters.base import Draft, DraftContext, DynamicTree, draft_along_backbone, last_rows
from spec_decode.drafters.dynamic import DynamicCandidates
from spec_decode.drafters.trainable import TrainableDrafter
from spec_decode.models import CausalLM, DecodingPass, KVCache, LayerShape, RMSNorm, States
from spec_decode.models.layers import Attend, Attention, GatedMLP, Rotation


class EagleLayer(nn.Module):
    """Decoder layer that attends over [normalised embedding, normalised feature] and adds to the raw feature.

    It has no biases and no norms of queries and keys, whatever the target has: serving engines read none.

    Args:
        shape: Sizes of the target's layers.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        shape = replace(shape, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape, in_features=2 * shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedMLP(shape)

    def forward(self, embedding: Tensor, feature: Tensor, by: Rotation, attend: Attend) -> Tensor:
        """Return the next feature, before any norm, of shape (B, n, h) like both inputs."""
        x = torch.cat([self.input_layernorm(embedding), self.hidden_norm(feature)], dim=-1)
        x = feature + self.self_attn(x, by, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class TrainingTimeTest:
    """Return the attention of the unrolled training steps.

    The query of step i at row p is the i-th drafted token behind position p. It sees the first step's keys up to row p
    and, of every later step up to its own, the key of row p alone.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the contexts (B, T, H * d) of this step's queries (B, T, H, d), keys and values (B, T, K, d)."""
        groups = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k, v))
        self._keys.append(k)
        self._values.append(v)
        size, scale = q.shape[2], q.shape[-1] ** -0.5
        history = (q @ self._keys[0][:, :, :size].transpose(-1, -2)) * scale
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        history = history.masked_fill(future, -torch.inf)
        later = [(q * keys[:, :, :size]).sum(-1, keepdim=True) * scale for keys in self._keys[1:]]
        weights = torch.cat([history, *later], dim=-1).float().softmax(-1).to(v.dtype)
        context = weights[..., :size] @ self._values[0][:, :, :size]
        for i, values in enumerate(self._values[1:]):
            context = context + weights[..., size + i, None] * values[:, :, :size]
        return context.transpose(1, 2).flatten(2)


class Eagle3(TrainableDrafter):
    """g_0 = fuse(features); g_{i+1} = layer(embedding of the next token, g_i); level i = head(norm(g_{i+1})).

    The drafted entries of its cache are overwritten by the next draft, which starts from the target's own features.

    Args:
        depth: Levels, and steps of the training-time test.
        draft_vocab: Tokens it can propose; None means all.

    References:
        EAGLE-3, arXiv 2503.01840; dynamic tree: EAGLE-2, arXiv 2406.16858.
    """

    capabilities = replace(TrainableDrafter.capabilities, dynamic=True)

    def __init__(self, depth: int = 7, draft_vocab: int | None = None) -> None:
        super().__init__(depth, draft_vocab)

    def build(self, target: CausalLM) -> None:
        """Make the layer, and a head that starts from the target's."""
        shape = target.shape
        self.fuse = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layer = EagleLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, self.draft_tokens, bias=False)
        self.norm.load_state_dict(target.norm.state_dict())
        if self.vocabulary is None:
            self.initialize_head()

    def initialize_head(self) -> None:
        """Start the drafter's head from the target's."""
        with torch.no_grad():
            self.head.weight.copy_(self.frozen_head())

    def level_states(self, tokens: Tensor, states: States) -> list[Tensor]:
        """Unroll the levels; level i has i rows fewer, because their tokens lie beyond the sequence."""
        test = TrainingTimeTest()
        feature, levels = self.fuse(states.features[:, :-1].to(self.dtype)), []
        for level in range(self.depth):
            rows = tokens.shape[1] - 1 - level
            if rows < 1:
                break
            by = self.rotation(level + torch.arange(rows, device=tokens.device).unsqueeze(0))
            feature = self.layer(self.embed(tokens[:, 1 + level :]), feature[:, :rows], by, test.attend)
            levels.append(self.norm(feature))
        return levels

    def level_logits(self, level: int, states: Tensor) -> Tensor:
        """Return the logits through its own head."""
        return self.head(states)

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return the cache of the layer."""
        return self.layer_cache(1, batch, capacity)

    def _groups(self) -> int:
        return self.target.shape.heads // self.target.shape.kv_heads

    def _step(self, tokens: Tensor, features: Tensor, this: DecodingPass) -> Tensor:
        return self.layer(self.embed(tokens), features, self.rotation(this.positions), this.attend(0))

    def propose(self, context: DraftContext) -> Draft:
        """Return the committed positions with the target's features first, then level by level on its own."""
        cache: KVCache = context.cache
        this = DecodingPass.run(cache, context.next_tokens.shape[1], groups=self._groups())
        fused = self.fuse(context.states.features.to(self.dtype))
        feature = last_rows(self._step(context.next_tokens, fused, this), context.counts).unsqueeze(1)
        cache.lengths = cache.lengths + context.counts
        if isinstance(context.tree, DynamicTree):
            return self._dynamic(context, context.tree, feature)
        committed = cache.lengths

        def advance(token: Tensor) -> Tensor:
            nonlocal feature
            feature = self._step(token.unsqueeze(1), feature, DecodingPass.run(cache, 1, groups=self._groups()))
            cache.lengths = cache.lengths + 1
            return self.head(self.norm(feature[:, 0]))

        first = self.head(self.norm(feature[:, 0]))
        draft = draft_along_backbone(context, first, advance, self.vocabulary, self.target.vocab_size)
        cache.lengths = committed
        return draft

    def _dynamic(self, context: DraftContext, tree: DynamicTree, feature: Tensor) -> Draft:
        """Return the tree grown by cumulative probability; `feature` (B, 1, h) is the root's."""
        candidates = DynamicCandidates(context, tree, self.vocabulary)
        tokens = candidates.expand(self.head(self.norm(feature)))
        feature = feature.expand(-1, tokens.shape[1], -1)
        for level in range(tree.depth - 1):
            this = DecodingPass(
                context.cache,
                torch.tensor(level, device=tokens.device),
                candidates.seen,
                first=level * tokens.shape[1],
                groups=self._groups(),
            )
            output = self._step(tokens, feature, this)
            tokens = candidates.expand(self.head(self.norm(output)))
            feature = output.gather(1, candidates.expanded.unsqueeze(-1).expand(-1, -1, output.shape[-1]))
        return candidates.tree(context.min_confidence)
