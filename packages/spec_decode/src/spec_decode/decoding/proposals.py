"""Draft trees from the logits of a drafter that predicts every level in one pass, for either verification rule.

Shapes: B rows of a batch, N levels, C tokens of the drafter's vocabulary, V of the target's. Level i (from 0) predicts
the token at the root's position + 1 + i.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from spec_decode.decoding.sampling import Sampling, Stream, check_logits, gumbel_noise
from spec_decode.decoding.tree import DraftTree, ancestor_mask, backbone_tree

RANKED = 256
"""Number of the likeliest tokens of a level among which candidates are sought."""


@dataclass(frozen=True, eq=False)
class SampledTree:
    """Constrained draft tree with candidates drawn from the drafter's distribution without replacement.

    Args:
        tree: Tree in the order of `backbone_parents`.
        draws: The candidates of each level in the order in which they were drawn, int64 of shape (B, N, K); -1 where
            there are fewer.
        log_probs: Log-probabilities each level was drawn from, of shape (B, N, V).
        check: Look for impossible draws, which waits for the device.

    Raises:
        ValueError: If a candidate has probability 0 under the distribution it is said to be drawn from.
    """

    tree: DraftTree
    draws: Tensor
    log_probs: Tensor
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if not check:
            return
        drawn = self.log_probs.gather(-1, self.draws.clamp(min=0))
        if (drawn.isneginf() & (self.draws >= 0)).any():
            raise ValueError("a candidate has probability 0 under log_probs; pass those it was really drawn from")


def _level_noise(draft_logits: Tensor, seeds: Tensor, root_positions: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """Return the Gumbel noise of shape (B, N, C) at the positions the levels predict."""
    ahead = torch.arange(1, draft_logits.shape[1] + 1, device=draft_logits.device)
    return gumbel_noise(seeds.unsqueeze(1), root_positions.unsqueeze(1) + ahead, ids, stream)


def matching_tree(
    root: Tensor,
    draft_logits: Tensor,
    branching: Sequence[int],
    *,
    temperature: float,
    seeds: Tensor,
    root_positions: Tensor,
    vocabulary: Tensor | None = None,
) -> DraftTree:
    """Return the tree of the tokens likeliest to be the target's draw, for `verify_matching`.

    The target will draw argmax(logits / temperature + noise) with noise that is already known here. So candidates are
    ranked by the drafter's logits + temperature * the same noise; temperature 0 leaves plain top-k. This is exact:
    under `verify_matching` the emitted tokens do not depend on the tree.

    Args:
        root: Last committed token per row, int64 of shape (B,).
        draft_logits: Logits of every level, shape (B, N, C).
        branching: Candidates per level, N numbers in [1, C].
        temperature: The target's temperature, >= 0.
        seeds: The target's seeds, int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).
        vocabulary: Target token of each of the drafter's tokens, int64 of shape (C,); None if they are the same.

    Returns:
        Tree of 1 + sum(branching) nodes.

    Raises:
        ValueError: If the logits define no distribution or the branching does not fit them.

    References:
        Shared noise for draft and target: Daliri, Musco and Suresh, arXiv 2408.07978 (one candidate per level).
    """
    scores = rank_tokens(
        draft_logits,
        temperature=temperature,
        seeds=seeds,
        root_positions=root_positions,
        vocabulary=vocabulary,
        count=max(RANKED, *branching),
    )
    return scores.tree(root, branching)


@dataclass(frozen=True, eq=False)
class RankedTokens:
    """Candidate tokens of every level, with their scores.

    Args:
        ids: Tokens, int64 of shape (B, N, c).
        scores: Scores of the ranking, float64 of the same shape.
        log_probs: How likely the drafter takes each to be the target's draw, as logarithms; the same shape.
    """

    ids: Tensor
    scores: Tensor
    log_probs: Tensor

    def tree(self, root: Tensor, branching: Sequence[int]) -> DraftTree:
        """Return the tree of the best of them; see `matching_tree`."""
        best, place = self.scores.topk(min(max(branching, default=1), self.ids.shape[-1]), dim=-1)
        return backbone_tree(root, self.ids.gather(-1, place).masked_fill(best.isneginf(), -1), branching, check=False)

    def path_probabilities(self, tree: DraftTree) -> Tensor:
        """Return the drafter's probability of reaching each node: the product of its probabilities along the path.

        Returns:
            Probabilities, float64 of shape (B, n): 1 at the root, meaningless at absent nodes.
        """
        above = ancestor_mask(tree.parents)
        rows = torch.arange(len(above), device=above.device).unsqueeze(1)
        level = (above.sum(-1) - 2).clamp(min=0)
        here = self.ids[rows, level] == tree.tokens.unsqueeze(-1)
        confidence = self.log_probs[rows, level].masked_fill(~here, -torch.inf).amax(-1)
        confidence[:, 0] = 0
        return torch.where(above, confidence.unsqueeze(1), 0).sum(-1).exp()


def rank_tokens(
    draft_logits: Tensor,
    *,
    temperature: float,
    seeds: Tensor,
    root_positions: Tensor,
    vocabulary: Tensor | None = None,
    count: int = RANKED,
) -> RankedTokens:
    """Return the score the drafter's likeliest tokens of every level; arguments as in `matching_tree`.

    Only the `count` largest logits are used, because noise for a whole vocabulary costs as much as a small target's
    pass. At temperature 0 the probabilities are the drafter's. Above it the noise is known, and they are the softmax of
    logits / temperature + noise among these tokens.
    """
    check_logits(draft_logits)
    logits, index = draft_logits.topk(min(count, draft_logits.shape[-1]), dim=-1)
    ids, logits = index if vocabulary is None else vocabulary[index], logits.double()
    if temperature == 0:
        return RankedTokens(ids, logits, logits - draft_logits.float().logsumexp(-1, keepdim=True))
    scores = logits + temperature * _level_noise(draft_logits, seeds, root_positions, ids, Stream.TARGET)
    # The best score becomes 0 first: no temperature, however small, can overflow it.
    log_probs = ((scores - scores.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    return RankedTokens(ids, scores, log_probs)


def sampled_tree(
    root: Tensor,
    draft_logits: Tensor,
    branching: Sequence[int],
    *,
    sampling: Sampling,
    seeds: Tensor,
    root_positions: Tensor,
    vocab_size: int,
    vocabulary: Tensor | None = None,
) -> SampledTree:
    """Draw a tree from the drafter's processed distribution without replacement, for `verify_sampled`.

    Gumbel-top-k draws them in order. The backbone is the likeliest drawn token. Any choice among the candidates is
    exact as long as they are tested in the order of drawing.

    Args:
        root: Last committed token per row, int64 of shape (B,).
        draft_logits: Logits of every level, shape (B, N, C).
        branching: Candidates per level, N numbers in [1, C].
        sampling: Processors of the draft distribution; any distribution is exact, the target's own is a good choice.
        seeds: int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).
        vocab_size: V.
        vocabulary: Target token of each of the drafter's tokens, int64 of shape (C,); None if they are the same.

    Returns:
        Tree of 1 + sum(branching) nodes, absent where a distribution has fewer tokens than the level has candidates.

    Raises:
        ValueError: If the logits define no distribution or the branching does not fit them.

    References:
        Kool, van Hoof and Welling, Stochastic beams and where to find them, arXiv 1903.06059, section 2.3.
    """
    ids = torch.arange(draft_logits.shape[-1], device=root.device) if vocabulary is None else vocabulary
    log_q = sampling.log_probs(draft_logits)
    perturbed = log_q + _level_noise(draft_logits, seeds, root_positions, ids, Stream.DRAFT)
    best, index = perturbed.topk(min(max(branching, default=1), len(ids)), dim=-1)
    rank = torch.arange(index.shape[-1], device=root.device)
    not_drawn = best.isneginf() | (rank >= torch.tensor(branching, device=root.device).unsqueeze(1))
    draws = ids[index].masked_fill(not_drawn, -1)
    full_log_q = log_q.new_full((*log_q.shape[:2], vocab_size), -torch.inf)
    full_log_q[..., ids] = log_q
    tree = backbone_tree(root, draws, branching, scores=log_q.gather(-1, index), check=False)
    return SampledTree(tree, draws, full_log_q, check=False)
