"""Lossless verification of a draft tree against the target's logits at its nodes.

Both rules walk down from the root. At each node one token is drawn whose distribution is exactly the target's processed
distribution there. If the tree holds the drawn token as a child, the walk moves to it; otherwise that token is the
bonus. The rules differ in how the token is drawn. For proofs and tests see docs/spec_exactness.md.
Shapes: B rows of a batch, n nodes, D the tree's depth, V tokens, A rows still walking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_decode.decoding.proposals import SampledTree
from spec_decode.decoding.sampling import Sampling, Stream, check_logits, gumbel_argmax, uniform_noise
from spec_decode.decoding.tree import DraftTree, paths


@dataclass(frozen=True, eq=False)
class Verified:
    """Outcome of one target pass.

    Args:
        path: Accepted nodes from the root down, int64 of shape (B, D + 1), -1 beyond.
        tokens: Tokens to emit, the accepted ones and then the bonus token, int64 of shape (B, D + 1), -1 beyond.
        accepted: Number of accepted draft tokens, int64 of shape (B,), in [0, D].
        tested: Levels at which the row's path met candidates, boolean of shape (B, D). The acceptance of a level is
            `matched.sum(0) / tested.sum(0)` over many passes.
    """

    path: Tensor
    tokens: Tensor
    accepted: Tensor
    tested: Tensor

    @property
    def bonus(self) -> Tensor:
        """Token drawn at the end of the accepted path, int64 of shape (B,): the root of the next tree."""
        return self.tokens.gather(1, self.accepted.unsqueeze(1)).squeeze(1)

    @property
    def matched(self) -> Tensor:
        """Levels at which a candidate was accepted, boolean of shape (B, D)."""
        return self.path[:, 1:] >= 0


def _walk(tree: DraftTree, logits: Tensor, draw: Callable[[Tensor, Tensor, int], Tensor]) -> Verified:
    """Follow drawn tokens down the tree; draw(rows, nodes, depth) returns one token for each of A rows."""
    if logits.dim() != 3 or logits.shape[:2] != tree.tokens.shape or logits.shape[2] <= int(tree.tokens.max()):
        raise ValueError(
            f"logits must have shape (batch, nodes, vocabulary) = ({tree.tokens.shape[0]}, {tree.tokens.shape[1]}, "
            f"> {int(tree.tokens.max())}), got {tuple(logits.shape)}"
        )
    check_logits(logits, tree.present)
    path_of = paths(tree.parents)
    node = torch.zeros_like(tree.tokens[:, 0])
    tokens = torch.full_like(path_of[:, 0], -1)
    rows = torch.arange(len(node), device=node.device)
    for depth in range(tokens.shape[1]):
        drawn = draw(rows, node[rows], depth)
        tokens[rows, depth] = drawn
        child = (tree.parents[rows] == node[rows].unsqueeze(1)) & (tree.tokens[rows] == drawn.unsqueeze(1))
        found = child.any(1)
        rows = rows[found]
        if len(rows) == 0:
            break
        node[rows] = child[found].int().argmax(1)
    path = path_of[torch.arange(len(node), device=node.device), node]
    inner = (tree.parents.unsqueeze(1) == torch.arange(tree.parents.shape[1], device=node.device).unsqueeze(1)).any(2)
    tested = (inner.gather(1, path.clamp(min=0)) & (path >= 0))[:, :-1]
    return Verified(path, tokens, (path >= 0).sum(1) - 1, tested)


def verify_matching(
    tree: DraftTree, logits: Tensor, sampling: Sampling, *, seeds: Tensor, root_positions: Tensor
) -> Verified:
    """Sample and match: draw every token from the target, and walk on while the tree holds the drawn token.

    This is exact for any tree, however its candidates were chosen. It emits the same tokens as plain decoding with
    `Sampling.draw` from the same logits. Greedy decoding is temperature 0.

    Args:
        tree: Draft tree.
        logits: Target logits at every node, shape (B, n, V).
        sampling: The target's processors.
        seeds: One seed per row, int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).

    Returns:
        Accepted path, tokens to emit and acceptance per level.

    Raises:
        ValueError: If the logits do not fit the tree, or hold NaN or +inf at a node that is present.
    """

    def draw(rows: Tensor, nodes: Tensor, depth: int) -> Tensor:
        return sampling.draw(logits[rows, nodes], seeds[rows], root_positions[rows] + depth + 1)

    return _walk(tree, logits, draw)


def recursive_rejection(p: Tensor, q: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the acceptance probability of candidates drawn without replacement, and the residual distribution.

    With R_1 = p and Q_1 = q, candidate x_j is accepted with probability min(1, R_j(x_j) / Q_j(x_j)). On rejection
    R_{j+1} is the normalised positive part of R_j - Q_j, and Q_{j+1} is Q_j without x_j, normalised.

    Args:
        p: Target distribution of shape (A, V).
        q: Distribution of the first draw, shape (A, V), positive at every candidate.
        draws: Candidates in the order in which they were drawn, int64 of shape (A, K), -1 where there are fewer.

    Returns:
        Acceptance probability of each candidate given that all before it were rejected, shape (A, K), 0 at -1; and the
        distribution of the token if all are rejected, shape (A, V).

    References:
        Jeon et al., arXiv 2402.14160; Chen et al. (Sequoia), arXiv 2402.12374.
    """
    acceptance = p.new_zeros(draws.shape)
    for j in range(draws.shape[1]):
        x = draws[:, j].clamp(min=0).unsqueeze(1)
        # Skipping a candidate of underflowed probability is exact too: the token is then drawn from R_j.
        drawn = (draws[:, j] >= 0).unsqueeze(1) & (q.gather(1, x) > 0)
        ratio = (p.gather(1, x) / q.gather(1, x)).clamp(max=1.0)
        acceptance[:, j] = torch.where(drawn, ratio, 0.0).squeeze(1)
        left = (p - q).clamp(min=0.0)
        mass = left.sum(1, keepdim=True)
        # No mass is left where p equals q up to rounding: the rejection itself then had no probability.
        p = torch.where(drawn & (mass > 0), left / mass, p)
        rest = q.scatter(1, x, 0.0)
        # Becomes NaN once q is used up; NaN > 0 being false, no further candidate is then tested.
        q = torch.where(drawn, rest / rest.sum(1, keepdim=True), q)
    return acceptance, p


def verify_sampled(
    draft: SampledTree, logits: Tensor, sampling: Sampling, *, seeds: Tensor, root_positions: Tensor
) -> Verified:
    """Return the recursive rejection without replacement, candidates tested in the order in which they were drawn.

    This is exact for candidates drawn from the recorded distributions with separate noise. It accepts more than
    `verify_matching` would with the same candidates.

    Args:
        draft: Constrained draft tree with its draws and their distributions.
        logits: Target logits at every node, shape (B, n, V).
        sampling: The target's processors.
        seeds: One seed per row, int64 of shape (B,).
        root_positions: Absolute position of the root, int64 of shape (B,).

    Returns:
        Accepted path, tokens to emit and acceptance per level.

    Raises:
        ValueError: If the logits do not fit the tree, or hold NaN or +inf at a node that is present.
    """
    levels = draft.draws.shape[1]

    def draw(rows: Tensor, nodes: Tensor, depth: int) -> Tensor:
        log_p, seed, position = sampling.log_probs(logits[rows, nodes]), seeds[rows], root_positions[rows] + depth + 1
        if depth == levels:
            return gumbel_argmax(log_p, seed, position)
        # A leaf has no children, yet testing the level's draws there is exact as well; its token is then the bonus.
        draws = draft.draws[rows, depth]
        acceptance, residual = recursive_rejection(log_p.exp(), draft.log_probs[rows, depth].double().exp(), draws)
        ranks = torch.arange(draws.shape[1], device=draws.device)
        accepted = uniform_noise(seed, position, ranks, Stream.ACCEPT) < acceptance
        first = draws.gather(1, accepted.int().argmax(1, keepdim=True)).squeeze(1)
        # The residual gives no probability to a rejected candidate, so the walk ends with a token drawn from it.
        return torch.where(accepted.any(1), first, gumbel_argmax(residual.log(), seed, position))

    return _walk(draft.tree, logits, draw)


def verify(
    draft: DraftTree | SampledTree, logits: Tensor, sampling: Sampling, *, seeds: Tensor, root_positions: Tensor
) -> Verified:
    """Verify by the rule that the draft was made for; arguments as in `verify_matching`."""
    if isinstance(draft, SampledTree):
        return verify_sampled(draft, logits, sampling, seeds=seeds, root_positions=root_positions)
    if draft.tokens.shape[1] == 1:  # plain decoding skips the walk
        drawn = sampling.draw(logits[:, 0], seeds, root_positions + 1).unsqueeze(1)
        path = torch.zeros_like(drawn)
        return Verified(path, drawn, path[:, 0], path[:, :0] > 0)
    return verify_matching(draft, logits, sampling, seeds=seeds, root_positions=root_positions)


def count_kept(tokens: Tensor, stop_tokens: Sequence[int], remaining: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many emitted tokens a row keeps, up to its first stop token and its length limit.

    After a cut the last kept token is the next root, and the KV rows to commit are `path[:, :kept]`.

    Args:
        tokens: Emitted tokens, int64 of shape (B, L), -1 beyond.
        stop_tokens: Tokens that end a row; the stop token itself is kept.
        remaining: Tokens the row may still emit, int64 of shape (B,), 0 for rows that are finished.

    Returns:
        Number of tokens kept, int64 of shape (B,), and whether the row is finished, boolean of shape (B,).
    """
    stops = torch.isin(tokens, torch.tensor(stop_tokens, dtype=tokens.dtype, device=tokens.device))
    before_stop = stops.cumsum(1) - stops.long() == 0
    limit = remaining.unsqueeze(1) > torch.arange(tokens.shape[1], device=tokens.device)
    keep = before_stop & limit & (tokens >= 0)
    kept = keep.sum(1)
    return kept, (stops & keep).any(1) | (kept >= remaining)
