"""Draft trees grown by cumulative draft probability, level by level.

Shapes: B rows, k nodes expanded per level, C draft tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from spec_decode.decoding.tree import DraftTree, prune_tree
from spec_decode.drafters.base import DraftContext, DynamicTree, rank_levels


class DynamicCandidates:
    """All nodes considered so far, and the frontier that is expanded next.

    The first `expand` takes the root's logits, every later one the frontier's. Each frontier node gets its k likeliest
    children. The k best of all children, by the probability of the whole path, are the next frontier. Above temperature
    0 these are the probabilities given the target's noise (`rank_tokens`).

    Args:
        context: Context with a dynamic tree.
        tree: Shape of the tree.
        vocabulary: Target token of each draft token; None if they are the same.

    Attributes:
        expanded: For each node of the frontier its parent's place in the frontier before, int64 of shape (B, k).
        seen: Boolean of shape (B, k, levels * k), True where a node of the frontiers so far, oldest first, is an
            ancestor of the frontier node or the node itself.

    References:
        EAGLE-2, arXiv 2406.16858.
    """

    expanded: Tensor
    seen: Tensor

    def __init__(self, context: DraftContext, tree: DynamicTree, vocabulary: Tensor | None) -> None:
        root = context.root
        self._context, self._root, self._shape, self._vocabulary = context, root, tree, vocabulary
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []  # index among all candidates, -1 below the root
        self._frontier = root.new_full((len(root), 1), -1)
        self._frontier_scores = torch.zeros(len(root), 1, dtype=torch.float64, device=root.device)

    def expand(self, logits: Tensor) -> Tensor:
        """Add the children of the frontier, given its logits (B, k, C) or the root's (B, 1, C).

        Returns:
            Tokens of the next frontier, int64 of shape (B, k).
        """
        width = min(self._shape.top_k, logits.shape[-1])
        best, tokens = self._likeliest(logits, width)
        scores = (self._frontier_scores.unsqueeze(-1) + best).flatten(1)
        start = sum(x.shape[1] for x in self._tokens)
        self._tokens.append(tokens.flatten(1))
        self._scores.append(scores)
        self._parents.append(self._frontier.repeat_interleave(width, dim=1))
        self._frontier_scores, chosen = scores.topk(width, dim=-1)
        self._frontier, self.expanded = start + chosen, chosen // width
        visible = torch.eye(width, dtype=torch.bool, device=chosen.device).expand(len(chosen), -1, -1)
        if start:
            above = self.seen.gather(1, self.expanded.unsqueeze(-1).expand(-1, -1, self.seen.shape[-1]))
            visible = torch.cat([above, visible], dim=-1)
        self.seen = visible
        return self._tokens[-1].gather(1, chosen)

    def _likeliest(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the log-probability and token of the likeliest children of each node, both of shape (B, k, width)."""
        nodes, context = logits.shape[1], self._context
        level = len(self._tokens)  # all nodes of a frontier are at one position and share its noise
        alone = replace(
            context,
            tree=(width,),
            seeds=context.seeds.repeat_interleave(nodes),
            root_positions=(context.root_positions + level).repeat_interleave(nodes),
        )
        ranked = rank_levels(alone, logits.flatten(0, 1).unsqueeze(1), self._vocabulary)
        best, place = ranked.log_probs.topk(width, dim=-1)
        tokens = ranked.ids.gather(-1, place)
        # Rounding must not make a child likelier than its parent.
        return best.clamp(max=0).view(-1, nodes, width), tokens.view(-1, nodes, width)

    def tree(self, min_confidence: float) -> DraftTree:
        """Return the best nodes of all; with a node its ancestors are among them, being at least as likely.

        Args:
            min_confidence: Nodes of a smaller probability are left out.
        """
        tokens, scores, parents = (torch.cat(x, dim=1) for x in (self._tokens, self._scores, self._parents))
        count = min(self._shape.nodes, tokens.shape[1])
        # A stable sort keeps parents, which come earlier, before children of the same score.
        kept = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(dim=-1).values
        place = torch.zeros_like(tokens).scatter(
            1, kept, torch.arange(1, count + 1, device=kept.device).expand_as(kept)
        )
        above = parents.gather(1, kept)
        nodes = torch.where(above < 0, 0, place.gather(1, above.clamp(min=0)))
        root = self._root.unsqueeze(1)
        tokens, parents = torch.cat([root, tokens.gather(1, kept)], 1), F.pad(nodes, (1, 0), value=-1)
        tree = DraftTree(tokens, parents, check=False)
        if not min_confidence:
            return tree
        return prune_tree(tree, F.pad(scores.gather(1, kept).exp(), (1, 0), value=1.0) >= min_confidence)
