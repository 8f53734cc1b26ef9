"""Independent draft models: small language models that read the text but not the target's states."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from kd_common.checks import at_least
from kd_common.errors import UserError
from spec_decode.drafters.base import Capabilities, Draft, DraftContext, Drafter, draft_along_backbone, last_rows
from spec_decode.drafters.trainable import TrainableDrafter
from spec_decode.models import CausalLM, DecoderLayer, DecodingPass, KVCache, RMSNorm, States
from spec_decode.models.layers import causal_attention


class Autoregressive(Drafter):
    """Drafter that works token by token behind the text; the next draft overwrites drafted entries of its cache."""

    @abstractmethod
    def next_logits(self, tokens: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
        """Append runs of tokens, (B, m) with (B,) counts, to the cache; return logits (B, C) behind the last ones."""

    def draft(self, context: DraftContext, vocabulary: Tensor | None, vocab_size: int) -> Draft:
        """Return the constrained tree along the backbone."""
        cache: KVCache = context.cache
        tokens, counts = context.next_tokens, context.counts
        if int(cache.lengths.max()) == 0:  # the first token follows nothing, so it is in no run of next tokens
            first = torch.tensor([[row[0]] for row in context.contexts], device=tokens.device)
            tokens, counts = torch.cat([first, tokens], dim=1), counts + 1
        logits = self.next_logits(tokens, counts, cache)
        committed, ones = cache.lengths, torch.ones_like(counts)
        draft = draft_along_backbone(
            context,
            logits,
            lambda token: self.next_logits(token.unsqueeze(1), ones, cache),
            vocabulary,
            vocab_size,
        )
        cache.lengths = committed
        return draft


class DraftModel(TrainableDrafter, Autoregressive):
    """Stack of layers between the target's frozen embeddings and its frozen head.

    Args:
        depth: Levels it may draft, one pass of the stack each.
        layers: Layers of the stack, >= 1, started from the target's first ones.
        draft_vocab: Tokens it can propose; None means all.

    Raises:
        UserError: If depth or layers is out of range.
    """

    def __init__(self, depth: int = 5, layers: int = 4, draft_vocab: int | None = None) -> None:
        super().__init__(depth, draft_vocab)
        at_least("layers", layers, 1)
        self.layers = layers
        self.supervised = 1  # the deeper levels repeat the same prediction

    def build(self, target: CausalLM) -> None:
        """Make the stack, which starts from the target's first layers and its norm."""
        self.stack = nn.ModuleList(DecoderLayer(target.shape) for _ in range(self.layers))
        self.norm = RMSNorm(target.shape.hidden_size, target.shape.norm_eps)
        for layer, source in zip(self.stack, target.layers, strict=False):
            layer.load_state_dict(source.state_dict())
        self.norm.load_state_dict(target.norm.state_dict())

    def level_states(self, tokens: Tensor, states: States) -> list[Tensor]:
        """Return the states of every level; level i at row p is the prediction behind token p + 1 + i."""
        x, by = self.embed(tokens), self.rotation(torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0))
        for layer in self.stack:
            x = layer(x, by, causal_attention())
        x = self.norm(x)
        return [x[:, 1 + level :] for level in range(self.depth)]

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return the cache of the stack."""
        return self.layer_cache(self.layers, batch, capacity)

    def next_logits(self, tokens: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
        """Return the predict the token behind every new position in one pass."""
        shape = self.target.shape
        this = DecodingPass.run(cache, tokens.shape[1], groups=shape.heads // shape.kv_heads)
        x, by = self.embed(tokens), self.rotation(this.positions)
        for index, layer in enumerate(self.stack):
            x = layer(x, by, this.attend(index))
        cache.lengths = cache.lengths + counts
        return self.frozen_logits(self.norm(last_rows(x, counts)))

    def propose(self, context: DraftContext) -> Draft:
        """Return the draft token by token."""
        return self.draft(context, self.vocabulary, self.target.vocab_size)


class PretrainedDraft(Autoregressive):
    """Pretrained language model with the target's tokenizer as drafter.

    Args:
        target: Target.
        model: Step runner of the draft model, on the target's device.
        shared: Number of tokens that both models know (`kd_common.hub.vocabulary.shared_vocabulary`). Ids beyond are
            padding and are never drafted. None means that neither vocabulary is padded.

    Raises:
        UserError: If the heads differ in size and it is not said how many tokens are shared, or one lacks some.
    """

    standalone = False

    def __init__(self, target: CausalLM, model: CausalLM, shared: int | None = None) -> None:
        if shared is None and model.vocab_size != target.vocab_size:
            raise UserError(
                f"the draft model has {model.vocab_size} tokens and the target {target.vocab_size}; if they have one "
                "tokenizer, say how many tokens it has (shared)"
            )
        fewest = min(model.vocab_size, target.vocab_size)
        self.shared = fewest if shared is None else shared
        if not 1 <= self.shared <= fewest:
            raise UserError(f"shared must be in [1, {fewest}], the smaller vocabulary, got {shared}")
        self.target, self.model = target, model
        self.capabilities = Capabilities(max_width=self.shared, samples=True, confident=True)

    def serves(self, target: CausalLM) -> bool:
        """Return whether it was built for this target."""
        return target is self.target

    def pack(self) -> None:
        """Return the pack the weights of the draft model."""
        self.model.pack()

    def weights(self) -> list[Tensor]:
        """Return the tensors of the draft model."""
        return [*self.model.parameters(), *self.model.buffers()]

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return the cache of the draft model."""
        return self.model.new_cache(batch, capacity)

    def next_logits(self, tokens: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
        """Return the predict the token behind every new position in one pass of the draft model."""
        known = tokens.clamp(max=self.model.vocab_size - 1)  # the target may write a token of its own padding
        return self.model.logits(last_rows(self.model.extend(known, counts, cache).final, counts))[..., : self.shared]

    def propose(self, context: DraftContext) -> Draft:
        """Return the draft token by token."""
        return self.draft(context, None, self.target.vocab_size)
