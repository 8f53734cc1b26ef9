"""Automatic tuning: measure the cost of passes and drafts on this machine and choose the tree that pays most, if any.

The acceptance comes from the drafter's validation, the choice from `cost.best_tree`.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from spec_decode.decoding.cost import TreeChoice, best_tree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.tree import DraftTree, backbone_parents
from spec_decode.drafters.base import DraftContext, Drafter, tree_slots
from spec_decode.models import CausalLM, KVCache, States

SIZES = (1, 8, 16, 24, 32)
"""Numbers of nodes whose passes are timed; trees are padded to multiples of 8."""


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Return the median times of calls that take turns after a warm-up round.

    Taking turns spreads a machine's slow moments over all calls.

    Every turn is two calls, of which the second counts: the first loads the processor's caches.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, measured in zip(calls, times, strict=True):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            measured.append(time.perf_counter() - start)
    return [median(measured[1:]) for measured in times]


def _filled(target: CausalLM, batch: int, length: int, extra: int) -> tuple[KVCache, Tensor, States]:
    """Return the cache that holds `length` tokens of every row, the tokens, and their states."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (batch, length), generator=generator).to(target.device)
    cache = target.new_cache(batch, length + extra)
    return cache, tokens, target.prefill(tokens, torch.full((batch,), length, device=target.device), cache)


@torch.no_grad()
def measure_passes(
    target: CausalLM, sizes: Sequence[int] = SIZES, *, batch: int = 1, length: int = 256, repeats: int = 9
) -> dict[int, float]:
    """Return the seconds of a target pass with its head by number of nodes, T(n).

    Args:
        target: Target.
        sizes: Numbers of nodes, the root included.
        batch: Rows.
        length: Cached tokens per row.
        repeats: Measurements per size, of which the median is taken.
    """
    length = min(length, target.context - 1)
    cache, tokens, _ = _filled(target, batch, length, max(sizes))
    calls: list[Callable[[], object]] = []
    for size in sizes:
        parents = backbone_parents((1,) * (size - 1)).to(target.device).expand(batch, -1)
        calls.append(partial(target.tree_logits, DraftTree(tokens.new_zeros(batch, size), parents, check=False), cache))
    return dict(zip(sizes, seconds(calls, target.device, repeats), strict=True))


@torch.no_grad()
def measure_drafts(
    target: CausalLM,
    drafter: Drafter,
    depth: int,
    *,
    width: int = 1,
    sampling: Sampling | None = None,
    batch: int = 1,
    length: int = 256,
    repeats: int = 9,
) -> list[float]:
    """Return the seconds to draft 1, 2, ..., `depth` levels behind `length` tokens, with two tokens committed per pass.

    Args:
        target: Target.
        drafter: Drafter for it.
        depth: Levels.
        width: Candidates per level.
        sampling: The target's processors; greedy by default.
        batch: Rows.
        length: Committed tokens per row.
        repeats: Measurements per depth, of which the median is taken.
    """
    length = min(length, target.context - 2)
    _, tokens, states = _filled(target, batch, length, 0)
    rows = torch.full((batch,), length - 1, device=target.device)

    def state(levels: int, start: int, cache: object) -> DraftContext:
        return DraftContext(
            contexts=tokens.tolist(),
            root=tokens[:, -1],
            root_positions=rows,
            states=States(states.features[:, start:-1], states.final[:, start:-1]),
            next_tokens=tokens[:, start + 1 :],
            counts=rows - start,
            tree=(width,) * levels,
            sampling=sampling or Sampling(0.0),
            seeds=row_seeds(0, batch).to(target.device),
            rejection=False,
            cache=cache,
        )

    calls: list[Callable[[], object]] = []
    for levels in range(1, depth + 1):
        # Every draft of `seconds`, two a turn, commits its two tokens again, so the capacity covers all of them.
        cache = drafter.new_cache(batch, length + 4 * (repeats + 1) + tree_slots((width,) * levels))
        drafter.propose(state(levels, 0, cache))
        calls.append(partial(drafter.propose, state(levels, length - 3, cache)))
    return seconds(calls, target.device, repeats)


def autotune(target: CausalLM, drafter: Drafter, *, batch: int = 1) -> TreeChoice:
    """Return the tree with the most expected tokens per second on this machine; empty where plain decoding is faster.

    A drafter without measured acceptance, such as prompt lookup, gets a chain of its `chain_depth`. The `SpeedMonitor`
    then decides whether drafting pays.
    """
    can = drafter.capabilities
    if not drafter.acceptance:
        depth = min(can.chain_depth, can.max_depth or can.chain_depth)
        return TreeChoice((1,) * depth, 1.0, 1.0)
    table = drafter.acceptance[: can.max_depth]
    passes = measure_passes(target, batch=batch)
    width = min(4, max(map(len, table)))
    drafts = measure_drafts(target, drafter, len(table), width=width, batch=batch)
    return best_tree(table, passes, drafts, branches=can.extra_branches)
