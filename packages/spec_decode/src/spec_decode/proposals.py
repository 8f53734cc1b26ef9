"""Draft trees from the logits of a drafter that predicts every level in one pass, for either rule of verification.

Shapes: B rows of a batch, N levels, C tokens of the drafter's vocabulary, V of the target's. Level i (from 0) predicts
the token at the root's position + 1 + i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_decode.sampling import Sampling, Stream, check_logits, gumbel_noise
from spec_decode.tree import DraftTree, ancestor_mask, backbone_tree


@dataclass(frozen=True, eq=False)
class SampledTree:
    """Constrained draft tree whose candidates were drawn from the drafter's law without replacement.

    Args:
        tree: Tree in the order of `backbone_parents`.
        draws: The candidates of each level in the order in which they were drawn, int64 of shape (B, N, K); -1 where
            there are fewer.
        log_probs: Log-law each level was drawn from, of shape (B, N, V).

    Raises:
        ValueError: If a candidate has probability 0 under the law it is said to be drawn from.
    """

    tree: DraftTree
    draws: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        drawn = self.log_probs.gather(-1, self.draws.clamp(min=0))
        if (drawn.isneginf() & (self.draws >= 0)).any():
            raise ValueError("a candidate has probability 0 under log_probs; pass the law it was really drawn from")


def _level_noise(draft_logits: Tensor, seeds: Tensor, root_positions: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """Gumbel noise of shape (B, N, C) at the positions the levels predict."""
    ahead = torch.arange(1, draft_logits.shape[1] + 1, device=draft_logits.device)
    return gumbel_noise(seeds.unsqueeze(1), root_positions.unsqueeze(1) + ahead, ids, stream)


def matching_tree(
    root: Tensor,
    draft_logits: Tensor,
    widths: Sequence[int],
    *,
    temperature: float,
    seeds: Tensor,
    root_positions: Tensor,
    vocabulary: Tensor | None = None,
) -> DraftTree:
    """Tree of the tokens likeliest to be the target's draw, for `verify_matching`.

    The target will draw argmax(logits / temperature + noise) with noise that is already known here, so candidates are
    ranked by the drafter's logits + temperature * the same noise; temperature 0 leaves plain top-k. Looking at the
    noise is allowed: under `verify_matching` the emitted tokens do not depend on the tree at all.

    Args:
        root: Last committed token per row, int64 of shape (B,).
        draft_logits: Logits of every level, shape (B, N, C).
        widths: Candidates per level, N numbers in [1, C].
        temperature: The target's temperature, >= 0.
        seeds: The target's seeds, int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).
        vocabulary: Target token of each of the drafter's tokens, int64 of shape (C,); None if they are the same.

    Returns:
        Tree of 1 + sum(widths) nodes.

    Raises:
        ValueError: If the logits define no distribution or the widths do not fit them.

    References:
        Shared noise for draft and target: Daliri, Musco and Suresh, arXiv 2408.07978 (one candidate per level).
    """
    check_logits(draft_logits)
    ids = torch.arange(draft_logits.shape[-1], device=root.device) if vocabulary is None else vocabulary
    scores = draft_logits.double()
    if temperature > 0:
        scores = scores + temperature * _level_noise(draft_logits, seeds, root_positions, ids, Stream.TARGET)
    best, index = scores.topk(min(max(widths, default=1), len(ids)), dim=-1)
    return backbone_tree(root, ids[index].masked_fill(best.isneginf(), -1), widths)


def path_probabilities(tree: DraftTree, draft_logits: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """How likely the drafter takes each node to be reached: the product of its laws along the path.

    Args:
        tree: Tree whose nodes at depth i + 1 are tokens of level i.
        draft_logits: Logits of every level, shape (B, N, C).
        vocabulary: Target token of each of the drafter's tokens, ascending, int64 of shape (C,); None if they are the
            same.

    Returns:
        float64 of shape (B, n): 1 at the root; what stands at absent nodes means nothing.
    """
    above = ancestor_mask(tree.parents)
    level = (above.sum(-1) - 2).clamp(min=0)
    token = tree.tokens.clamp(min=0)
    if vocabulary is not None:
        token = torch.searchsorted(vocabulary, token).clamp(max=len(vocabulary) - 1)
    log_laws = draft_logits.double().log_softmax(-1)
    own = log_laws[torch.arange(len(token), device=token.device).unsqueeze(1), level, token]
    own[:, 0] = 0
    return torch.where(above, own.unsqueeze(1), 0).sum(-1).exp()


def sampled_tree(
    root: Tensor,
    draft_logits: Tensor,
    widths: Sequence[int],
    *,
    sampling: Sampling,
    seeds: Tensor,
    root_positions: Tensor,
    vocab_size: int,
    vocabulary: Tensor | None = None,
) -> SampledTree:
    """Tree of tokens drawn from the drafter's processed law without replacement, for `verify_sampled`.

    Gumbel-top-k draws them in order. The backbone is the likeliest one drawn; any choice among the candidates is
    allowed, while they must be tested in the order in which they were drawn.

    Args:
        root: Last committed token per row, int64 of shape (B,).
        draft_logits: Logits of every level, shape (B, N, C).
        widths: Candidates per level, N numbers in [1, C].
        sampling: Processors of the draft law; any law is exact, the target's own is a good choice.
        seeds: int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).
        vocab_size: V.
        vocabulary: Target token of each of the drafter's tokens, int64 of shape (C,); None if they are the same.

    Returns:
        Tree of 1 + sum(widths) nodes, absent where a law has fewer tokens than the level has candidates.

    Raises:
        ValueError: If the logits define no distribution or the widths do not fit them.

    References:
        Kool, van Hoof and Welling, Stochastic beams and where to find them, arXiv 1903.06059, section 2.3.
    """
    ids = torch.arange(draft_logits.shape[-1], device=root.device) if vocabulary is None else vocabulary
    log_q = sampling.log_probs(draft_logits)
    perturbed = log_q + _level_noise(draft_logits, seeds, root_positions, ids, Stream.DRAFT)
    best, index = perturbed.topk(min(max(widths, default=1), len(ids)), dim=-1)
    rank = torch.arange(index.shape[-1], device=root.device)
    not_drawn = best.isneginf() | (rank >= torch.tensor(widths, device=root.device).unsqueeze(1))
    draws = ids[index].masked_fill(not_drawn, -1)
    full_log_q = log_q.new_full((*log_q.shape[:2], vocab_size), -torch.inf)
    full_log_q[..., ids] = log_q
    return SampledTree(backbone_tree(root, draws, widths, scores=log_q.gather(-1, index)), draws, full_log_q)
