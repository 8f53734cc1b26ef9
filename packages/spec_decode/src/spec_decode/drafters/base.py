"""Base class of drafters. A drafter reads the committed tokens and proposes a tree of continuations.

Shapes: B rows of a batch, m newly committed positions, h the target's hidden size, N levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd_common.errors import UserError
from spec_decode.decoding.proposals import RANKED, RankedTokens, SampledTree, rank_tokens, sampled_tree
from spec_decode.decoding.sampling import Sampling
from spec_decode.decoding.tree import DraftTree, prune_tree
from spec_decode.models import CausalLM, States

Draft = DraftTree | SampledTree


@dataclass(frozen=True)
class DynamicTree:
    """Tree grown by cumulative draft probability, as EAGLE-2 and EAGLE-3 do.

    Args:
        depth: Levels, >= 1.
        top_k: Nodes expanded per level and children considered per node, >= 1.
        nodes: Draft nodes kept for verification, >= 1.

    Raises:
        UserError: If a setting is no whole number or out of range.
    """

    depth: int = 7
    top_k: int = 10
    nodes: int = 59

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 1 for size in (self.depth, self.top_k, self.nodes)):
            raise UserError(f"depth, top_k and nodes of a dynamic tree must be whole numbers >= 1, got {self}")


TreeShape = tuple[int, ...] | DynamicTree
"""Candidates per level of a constrained tree (empty: plain decoding), or a dynamic tree."""


def tree_depth(shape: TreeShape) -> int:
    """Return the number of levels."""
    return shape.depth if isinstance(shape, DynamicTree) else len(shape)


def tree_nodes(shape: TreeShape) -> int:
    """Return the largest number of nodes, the root included."""
    return 1 + (shape.nodes if isinstance(shape, DynamicTree) else sum(shape))


def verified_slots(shape: TreeShape) -> int:
    """Return the most nodes of a target pass: the tree and one lookup branch, rounded up to a multiple of 8."""
    return -(-(tree_nodes(shape) + tree_depth(shape)) // 8) * 8


def tree_slots(shape: TreeShape) -> int:
    """Return the cache slots behind the committed tokens that drafting or verifying such a tree may write to."""
    slots = verified_slots(shape)
    return max(slots, shape.depth * shape.top_k) if isinstance(shape, DynamicTree) else slots


@dataclass(frozen=True, eq=False)
class DraftContext:
    """Inputs of a draft. The root is the last committed token; the target has not seen it yet.

    Args:
        contexts: Committed tokens of each row, the root included.
        root: int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).
        states: The target's states at the positions committed since the last draft, shapes (B, m, .).
        next_tokens: Token that follows each of these positions, int64 of shape (B, m), -1 beyond `counts`; a row's
            last one is its root.
        counts: Number of these positions, int64 of shape (B,), in [0, m]; 0 for finished rows.
        tree: Shape of the tree to draft.
        sampling: The target's processors.
        seeds: The target's seeds, int64 of shape (B,).
        rejection: Whether the candidates must be drawn from the drafter's distribution, for `verify_sampled`.
        cache: Cache of the batch, from the drafter's `new_cache`.
        min_confidence: Nodes that the drafter takes to be reached with a smaller probability are left out.
    """

    contexts: Sequence[Sequence[int]]
    root: Tensor
    root_positions: Tensor
    states: States
    next_tokens: Tensor
    counts: Tensor
    tree: TreeShape
    sampling: Sampling
    seeds: Tensor
    rejection: bool
    cache: Any
    min_confidence: float = 0.0


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of a drafter.

    Args:
        max_depth: Most levels; None without a limit.
        max_width: Most candidates of a level; None without a limit.
        chain_depth: Levels of a chain where neither a tree nor a measurement says how many.
        samples: Whether it can draw its candidates, as `verify_sampled` needs.
        dynamic: Whether it can draft a `DynamicTree`.
        confident: Whether its nodes have probabilities, which `min_confidence` needs.
        extra_branches: Number of further branches that a draft may add to the tree, each as long as the tree is deep.
    """

    max_depth: int | None = None
    max_width: int | None = None
    chain_depth: int = 4
    samples: bool = False
    dynamic: bool = False
    confident: bool = False
    extra_branches: int = 0


class Drafter(ABC):
    """Interface of drafters, which propose trees.

    One instance serves any number of batches; each batch has its own draft cache.

    Attributes:
        capabilities: Capabilities of the drafter.
        standalone: Whether its name says everything, for it needs no weights and no other drafter.
        acceptance: Acceptance by level and rank measured on validation text (see `cost`); None if not measured.
    """

    capabilities = Capabilities()
    standalone: ClassVar[bool] = True
    acceptance: list[list[float]] | None = None

    def serves(self, target: CausalLM) -> bool:
        """Return whether it drafts for this target; a drafter that reads only the text drafts for any."""
        return True

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return the state of a new batch of rows that may grow to `capacity` tokens, draft nodes included."""
        return None

    def pack(self) -> None:  # noqa: B027  # most drafters have nothing to prepare
        """Prepare frozen weights for decoding when a decoder is made; see `models.packed`."""

    def weights(self) -> list[Tensor]:
        """Return all its tensors, including the target's."""
        return [*self.parameters(), *self.buffers()] if isinstance(self, torch.nn.Module) else []

    @abstractmethod
    def propose(self, context: DraftContext) -> Draft:
        """Return the tree below the root of every row.

        It is a `SampledTree` where `context.rejection` asks for drawn candidates.
        """


def draft_from_levels(context: DraftContext, logits: Tensor, vocabulary: Tensor | None, vocab_size: int) -> Draft:
    """Return the constrained tree of a drafter whose levels do not depend on one another.

    Args:
        context: Context with a constrained tree of N levels.
        logits: Logits per level, shape (B, N, C).
        vocabulary: Target token of each of the C draft tokens; None if they are the same.
        vocab_size: V.
    """
    assert isinstance(context.tree, tuple)
    if context.rejection:
        return sampled_tree(
            context.root,
            logits,
            context.tree,
            sampling=context.sampling,
            seeds=context.seeds,
            root_positions=context.root_positions,
            vocab_size=vocab_size,
            vocabulary=vocabulary,
        )
    return ranked_tree(context, rank_levels(context, logits, vocabulary))


def ranked_tree(context: DraftContext, ranked: RankedTokens) -> DraftTree:
    """Return the constrained tree of the best tokens of every level, pruned below `context.min_confidence`."""
    assert isinstance(context.tree, tuple)
    tree = ranked.tree(context.root, context.tree)
    if context.min_confidence:
        tree = prune_tree(tree, ranked.path_probabilities(tree) >= context.min_confidence)
    return tree


def rank_levels(context: DraftContext, logits: Tensor, vocabulary: Tensor | None) -> RankedTokens:
    """Return the candidates' scores under the drafter's distribution; arguments as in `draft_from_levels`."""
    assert isinstance(context.tree, tuple)
    return rank_tokens(
        logits,
        temperature=context.sampling.temperature,
        seeds=context.seeds,
        root_positions=context.root_positions,
        vocabulary=vocabulary,
        # Without noise the order is the drafter's.
        count=max(RANKED if context.sampling.temperature else 1, *context.tree),
    )


def last_rows(x: Tensor, counts: Tensor) -> Tensor:
    """Return the last counted position of every row, shape (B, ...) out of (B, m, ...).

    It is position 0 where nothing is counted.
    """
    return x[torch.arange(len(x), device=x.device), (counts - 1).clamp(min=0)]


def draft_along_backbone(
    context: DraftContext,
    logits: Tensor,
    advance: Callable[[Tensor], Tensor],
    vocabulary: Tensor | None,
    vocab_size: int,
) -> Draft:
    """Return the constrained tree of a drafter that needs the backbone's token before it can predict the next level.

    Under `min_confidence` drafting ends with the level in which the backbones of all rows fall below it.

    Args:
        context: Context with a constrained tree.
        logits: Logits of the first level, shape (B, C).
        advance: Backbone token of a level, (B,) -> logits of the next level, (B, C).
        vocabulary: Target token of each of the C draft tokens; None if they are the same.
        vocab_size: V.
    """
    assert isinstance(context.tree, tuple)
    levels, ranked = [logits], []
    reached = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for level, width in enumerate(context.tree):
        # This level alone: its noise is a function of the position, so its backbone is the final one.
        alone = replace(context, root_positions=context.root_positions + level)
        if not context.rejection:
            ranked.append(rank_levels(alone, levels[-1].unsqueeze(1), vocabulary))
        if level + 1 == len(context.tree):  # nothing is drafted behind the last level's backbone
            break
        if context.rejection:
            draft = draft_from_levels(replace(alone, tree=(width,)), levels[-1].unsqueeze(1), vocabulary, vocab_size)
            assert isinstance(draft, SampledTree)
            best = draft.tree.tokens[:, 1].clamp(min=0)
        else:
            place = ranked[-1].scores[:, 0].argmax(-1, keepdim=True)
            best = ranked[-1].ids[:, 0].gather(-1, place).squeeze(1)
            if context.min_confidence:  # which waits for the device
                reached = reached + ranked[-1].log_probs[:, 0].gather(-1, place).squeeze(1)
                if (reached.exp() < context.min_confidence).all():
                    break
        levels.append(advance(best))
    if context.rejection:
        return draft_from_levels(context, torch.stack(levels, dim=1), vocabulary, vocab_size)
    parts = [(r.ids, r.scores, r.log_probs) for r in ranked]
    together = RankedTokens(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    return ranked_tree(replace(context, tree=context.tree[: len(ranked)]), together)
