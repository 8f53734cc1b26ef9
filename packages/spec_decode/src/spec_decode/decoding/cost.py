"""Cost model of speculative decoding with a constrained draft tree, and the tree it recommends.

tau, the mean acceptance length, counts all tokens emitted per target pass: accepted draft tokens + 1. Acceptance is a
table `acceptance[level][rank]`: the probability that the target's next token is the candidate of this rank. The walk
has then reached this level on the backbone, whose candidate has rank 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class TreeChoice:
    """Draft tree and its expected gain.

    Args:
        branching: Candidates per level; empty for plain decoding without drafts.
        tokens_per_pass: Expected tau.
        speedup: Expected tokens per second relative to plain decoding.
    """

    branching: tuple[int, ...]
    tokens_per_pass: float
    speedup: float


def check_acceptance(acceptance: Sequence[Any]) -> None:
    """Raise for a table that is not acceptance by level and rank.

    Raises:
        ValueError: Naming the level.
    """
    for level, row in enumerate(acceptance):
        numbers = isinstance(row, Sequence) and len(row) > 0 and all(isinstance(a, Real) for a in row)
        if not numbers or not all(0 <= a <= 1 for a in row) or sum(row) > 1 + 1e-6:
            raise ValueError(
                f"acceptance of level {level} must list at least one probability and sum to at most 1, got {row}"
            )


def _check_tables(
    acceptance: Sequence[Sequence[float]], verify_times: Mapping[int, float], draft_times: Sequence[float]
) -> None:
    check_acceptance(acceptance)
    if 1 not in verify_times:
        raise ValueError("verify_times must hold the time of one node, the pass of plain decoding")
    if not all(math.isfinite(t) and t > 0 for t in verify_times.values()):
        raise ValueError(f"verify_times must be positive and finite, got {dict(verify_times)}")
    if len(draft_times) != len(acceptance) or not all(math.isfinite(t) and t >= 0 for t in draft_times):
        raise ValueError(
            f"draft_times must hold one finite time >= 0 per level ({len(acceptance)}), got {list(draft_times)}"
        )


def expected_tokens(acceptance: Sequence[Sequence[float]], branching: Sequence[int]) -> float:
    """Return the expected tau: 1 + sum over levels of P(backbone accepted above) * P(a candidate is accepted here).

    Args:
        acceptance: Acceptance by level and rank, at least as deep and wide as the tree.
        branching: Candidates per level.

    Returns:
        Expected number of tokens per target pass, in [1, len(branching) + 1].
    """
    tokens, reached = 1.0, 1.0
    for row, width in zip(acceptance, branching, strict=False):
        tokens += reached * sum(row[:width])
        reached *= row[0]
    return tokens


def speedup(tokens_per_pass: float, plain_time: float, draft_time: float, verify_time: float) -> float:
    """Return the tokens per second relative to plain decoding: tau * T(1) / (T_draft + T(n)), times in one unit."""
    return tokens_per_pass * plain_time / (draft_time + verify_time)


def best_tree(
    acceptance: Sequence[Sequence[float]],
    verify_times: Mapping[int, float],
    draft_times: Sequence[float],
    *,
    branches: int = 0,
) -> TreeChoice:
    """Return the constrained tree with the most expected tokens per second, or none where drafting does not pay.

    This is exact. Only the backbone is expanded, so the gain of a level does not depend on the candidates of other
        levels. The best branching for every depth and number of nodes follows from a knapsack over the levels.

    Args:
        acceptance: Acceptance by level and rank; its size bounds depth and width. The candidates of a rank must not
            depend on the width, as for top-k candidates.
        verify_times: Measured time of a target pass by number of nodes, root included; a tree of another size is
            padded to the next measured one. Must hold 1, the pass of plain decoding.
        draft_times: Time to draft 1, 2, ... levels, in the same unit.
        branches: Further branches, as long as the tree is deep, for which a pass needs capacity.

    Returns:
        The choice; of equally fast ones the shallowest, then the one of the fewest nodes.

    Raises:
        ValueError: If a table is malformed.
    """
    _check_tables(acceptance, verify_times, draft_times)
    plain_time = verify_times[1]
    best = TreeChoice((), 1.0, 1.0)
    # By number of draft nodes, at exactly the current depth: the largest tau and its branching.
    frontier: dict[int, tuple[float, tuple[int, ...]]] = {0: (1.0, ())}
    reached = 1.0
    for depth, (row, draft_time) in enumerate(zip(acceptance, draft_times, strict=True), start=1):
        deeper: dict[int, tuple[float, tuple[int, ...]]] = {}
        for nodes, (tokens, branching) in frontier.items():
            for width in range(1, len(row) + 1):
                option = (tokens + reached * sum(row[:width]), (*branching, width))
                if option[0] > deeper.get(nodes + width, (0.0, ()))[0]:
                    deeper[nodes + width] = option
        frontier, reached = deeper, reached * row[0]
        for size in sorted(verify_times):
            limit = size - branches * depth
            fitting = [(tokens, -nodes, branching) for nodes, (tokens, branching) in frontier.items() if nodes < limit]
            if not fitting:
                continue
            tokens, _, branching = max(fitting)
            gain = speedup(tokens, plain_time, draft_time, verify_times[size])
            # If nothing is accepted, a gain is noise of the measured times.
            if tokens > 1 and gain > best.speedup:
                best = TreeChoice(branching, tokens, gain)
    return best
