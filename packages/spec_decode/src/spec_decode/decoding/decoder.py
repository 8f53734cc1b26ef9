"""Speculative decoding of a batch: draft, one target pass over the tree, verification, commit.

Plain decoding is the same loop with a tree of the root alone. Proofs and tests that the drafter does not change what is
emitted: docs/spec_exactness.md. Shapes: B rows, n nodes, D levels.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spec_decode.decoding.guard import PayGuard
from spec_decode.decoding.inputs import check_length, check_whole, prompt_lists
from spec_decode.decoding.proposals import SampledTree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.stopping import StopStrings
from spec_decode.decoding.tree import DraftTree, pad_tree
from spec_decode.decoding.verify import Verified, count_kept, verify_matching, verify_sampled
from spec_decode.drafters.base import Draft, Drafter, DraftState, DynamicTree, TreeShape, tree_depth, tree_slots
from spec_decode.models import CausalLM, KVCache, States

OnTokens = Callable[[int, list[int], list[bool]], None]
"""Called with a row, its new tokens, and whether each was drafted."""

OnPass = Callable[[DraftTree, Verified], None]
"""Called with the tree of every target pass and what became of it."""

PHASES = ("prefill", "draft", "target", "verify", "commit")


@dataclass(eq=False)
class Generation:
    """What was generated.

    Attributes:
        sequences: Prompts and new tokens, int64 of shape (B, L), padded behind each row's end with `pad_token`.
        prompt_lengths: Tokens of each prompt.
        lengths: Tokens of each row, prompt included.
        acceptance_lengths: Per row the tokens kept from each target pass: accepted draft tokens + 1, fewer where a
            stop or a limit cut the last pass. The prefill and its token are not counted.
        tested: Passes, of all rows, whose walk met candidates at each level.
        matched: Passes in which one of them was accepted; `matched / tested` is the acceptance of the level.
        pass_sizes: Target passes by their number of nodes, absent ones included.
        timings: Seconds of each phase in `PHASES`, and of everything under "total".
    """

    sequences: Tensor
    prompt_lengths: list[int]
    lengths: list[int]
    acceptance_lengths: list[list[int]]
    tested: list[int]
    matched: list[int]
    pass_sizes: dict[int, int]
    timings: dict[str, float]

    @property
    def new_tokens(self) -> list[list[int]]:
        """New tokens of each row."""
        rows = zip(self.sequences.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [row[start:end] for row, start, end in rows]

    @property
    def tau(self) -> float:
        """Mean acceptance length: tokens per target pass and row, accepted + 1; 1 when no pass was made."""
        lengths = [length for row in self.acceptance_lengths for length in row]
        return sum(lengths) / len(lengths) if lengths else 1.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows after the prefill's, per second spent after the prefill."""
        tokens = sum(sum(row) for row in self.acceptance_lengths)
        return tokens / max(self.timings["total"] - self.timings["prefill"], 1e-9)


@dataclass
class _Clock:
    """Adds up the seconds of phases, waiting for the device at every boundary."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _last: float = 0.0

    def start(self) -> None:
        self._wait()
        self._last = time.perf_counter()

    def stop(self, phase: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class SpeculativeDecoder:
    """Generates with a target and a drafter, losslessly.

    Args:
        target: Step runner of the target.
        drafter: Drafter for this target; None decodes plainly.
        tree: Candidates per level, such as (3, 2, 1); a `DynamicTree`, for drafters that can; or "auto", which measures
            this machine once and takes the tree with the most expected tokens per second for a single row, or none if
            none pays, and falls back to plain decoding where that is faster after all (`PayGuard`). None
            means a chain of all the drafter's levels, of its `chain_depth` where it has no limit.
        rejection: Draw candidates from the drafter's law and verify by recursive rejection. The default,
            sample-and-match, emits token for token what plain decoding with the same seed emits.
        min_confidence: Leave out the nodes that the drafter takes to be reached with a smaller probability, in [0, 1):
            the product along the path of its laws, which know the noise. 0 keeps them all.
        compile: Compile the target's passes (`CausalLM.compile_steps`): seconds to minutes for the first of every size.
        tokenizer: Needed for stop strings only.

    Raises:
        ValueError: If the drafter cannot draft such a tree or cannot sample.
    """

    def __init__(
        self,
        target: CausalLM,
        drafter: Drafter | None = None,
        *,
        tree: Sequence[int] | DynamicTree | str | None = None,
        rejection: bool = False,
        min_confidence: float = 0.0,
        compile: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        if compile:
            target.compile_steps()
        for model in (target, drafter):
            if model is not None:
                model.pack()
        self.tree: TreeShape
        self.guards: defaultdict[int, PayGuard] | None = None  # by number of rows
        if drafter is None:
            self.tree = ()
        elif tree is None:
            self.tree = (1,) * (drafter.max_depth or drafter.chain_depth)
        elif isinstance(tree, str):
            if tree != "auto":
                raise ValueError(f"tree must be widths per level, a DynamicTree or 'auto', got {tree!r}")
            from spec_decode.decoding.autotune import autotune  # which times this class

            choice = autotune(target, drafter)
            self.tree, self.guards = choice.widths, defaultdict(PayGuard)
        else:
            self.tree = tree if isinstance(tree, DynamicTree) else tuple(tree)
        self.rejection, self.min_confidence = rejection, min_confidence
        self._check()

    def _check(self) -> None:
        drafter, shape = self.drafter, self.tree
        if drafter is None:
            return
        name = type(drafter).__name__
        if not drafter.serves(self.target):
            raise ValueError(f"this {name} was built for another target; build or load it with the one it drafts for")
        if isinstance(shape, tuple) and any(type(w) is not int or w < 1 for w in shape):
            raise ValueError(f"every level of the tree needs a number of candidates >= 1, got {shape}")
        if isinstance(shape, DynamicTree) and not drafter.dynamic:
            raise ValueError(f"{name} cannot draft a dynamic tree; give the candidates per level")
        widest = shape.top_k if isinstance(shape, DynamicTree) else max(shape, default=1)
        if drafter.max_width is not None and widest > drafter.max_width:
            raise ValueError(f"{name} has {drafter.max_width} candidates for a level, the tree asks for {widest}")
        if drafter.max_depth is not None and tree_depth(shape) > drafter.max_depth:
            raise ValueError(f"{name} drafts at most {drafter.max_depth} levels, the tree has {tree_depth(shape)}")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence must be in [0, 1), got {self.min_confidence}")
        if self.min_confidence and not drafter.confident:
            raise ValueError(f"the drafts of {name} have no probabilities; leave min_confidence at 0")
        if self.min_confidence and self.rejection:
            raise ValueError("choosing among drawn candidates would change their law; leave min_confidence at 0")
        if self.rejection and not drafter.samples:
            raise ValueError(f"{name} does not draw its candidates; leave rejection off (sample-and-match)")
        if self.rejection and isinstance(shape, DynamicTree):
            raise ValueError("a dynamic tree ranks its candidates, so they are no draws; leave rejection off")

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        pad_token: int = 0,
        on_tokens: OnTokens | None = None,
        on_pass: OnPass | None = None,
    ) -> Generation:
        """Continue every prompt until a stop token or string, `max_new_tokens` or the end of the context.

        Args:
            input_ids: Prompts as lists of token ids, or int64 of shape (B, P).
            attention_mask: For padded input of shape (B, P): 1 at the tokens that count.
            max_new_tokens: Most tokens to add per row; None fills the context.
            temperature: See `Sampling`; 0 is greedy.
            top_k: See `Sampling`.
            top_p: See `Sampling`.
            seed: Seed of every draw; a row's draws depend on it, the row's number and the position only.
            stop_tokens: Tokens that end a row; the token itself is kept.
            stop_strings: Texts that end a row as soon as its new text holds one; the completing token is kept.
            pad_token: Fills `sequences` behind the end of a row.
            on_tokens: Called after every pass for every row that got new tokens.
            on_pass: Called after every pass, for pictures and statistics.

        Raises:
            ValueError: For an empty prompt, one that fills the context, a token outside the vocabulary, a setting out
                of range, or logits that are NaN.
        """
        target = self.target
        sampling = Sampling(temperature, top_k, top_p)
        prompts = prompt_lists(input_ids, attention_mask, target.vocab_size, target.context)
        check_length(max_new_tokens)
        check_whole("stop_tokens", *stop_tokens)
        batch, device = len(prompts), target.device
        room = [min(target.context - len(p), max_new_tokens or target.context) for p in prompts]
        run = _Run(
            contexts=[list(p) for p in prompts],
            remaining=torch.tensor(room, device=device),
            stop_tokens=tuple(stop_tokens),
            stop_strings=StopStrings(stop_strings, self.tokenizer, batch) if stop_strings else None,
            on_tokens=on_tokens,
        )
        seeds = row_seeds(seed, batch).to(device)
        width = max(map(len, prompts))
        capacity = max(len(p) + r for p, r in zip(prompts, room, strict=True)) + tree_slots(self.tree)
        cache = target.new_cache(batch, capacity)
        guard = None if self.guards is None else self.guards[batch]
        missed = max(room) if guard is not None and batch > 1 else 0  # read at once, padded to the longest run
        memory = self.drafter.new_memory(batch, capacity + missed) if self.drafter and self.tree else None

        clock, began = _Clock(device), time.perf_counter()
        clock.start()
        if guard is not None:
            guard.begin()
        counts = torch.tensor([len(p) for p in prompts], device=device)
        padded = torch.tensor([[*p, *[-1] * (width - len(p))] for p in prompts], device=device)
        states = target.prefill(padded, counts, cache)
        last = target.logits(states.final[torch.arange(batch, device=device), counts - 1])
        first = sampling.draw(last, seeds, counts).unsqueeze(1)
        kept = run.accept(first, torch.zeros_like(counts))
        following = F.pad(padded[:, 1:], (0, 1), value=-1).scatter(1, counts.unsqueeze(1) - 1, first)
        clock.stop("prefill")

        depth = tree_depth(self.tree)
        tested, matched = torch.zeros(depth, dtype=torch.int64), torch.zeros(depth, dtype=torch.int64)
        lengths: list[list[int]] = [[] for _ in prompts]
        pass_sizes: Counter[int] = Counter()
        unread = [(states, following, counts)]  # committed positions that the drafter has not seen
        while not run.done:
            drafting = bool(self.drafter and self.tree) and (guard is None or guard.drafts())
            roots, positions = run.roots(device)
            draft: Draft = DraftTree(roots.unsqueeze(1), roots.new_full((batch, 1), -1))
            before = sum(clock.seconds.values())
            if self.drafter and drafting:
                states, following, counts = _join(unread)
                unread.clear()
                draft = _pad(
                    self.drafter.propose(
                        DraftState(
                            contexts=run.contexts,
                            root=roots,
                            root_positions=positions,
                            states=states,
                            next_tokens=following,
                            counts=counts,
                            tree=self.tree,
                            sampling=sampling,
                            seeds=seeds,
                            rejection=self.rejection,
                            memory=memory,
                            min_confidence=self.min_confidence,
                        )
                    )
                )
            clock.stop("draft")
            tree = draft.tree if isinstance(draft, SampledTree) else draft
            logits, passed = target.tree_logits(tree, cache)
            pass_sizes[tree.tokens.shape[1]] += 1
            clock.stop("target")
            active = run.remaining > 0
            verified = _verify(draft, logits, sampling, seeds, positions)
            clock.stop("verify")
            spent = sum(clock.seconds.values()) - before
            kept = run.accept(verified.tokens, verified.accepted)
            if on_pass is not None:
                on_pass(tree, verified)
            committed = commit(cache, passed, verified, kept)
            if self.tree:
                unread.append(committed)
            for row, count in enumerate(kept.tolist()):
                if count:
                    lengths[row].append(count)
            levels = verified.tested.shape[1]
            tested[:levels] += (verified.tested & active.unsqueeze(1)).sum(0).cpu()[:depth]
            matched[:levels] += (verified.matched & active.unsqueeze(1)).sum(0).cpu()[:depth]
            clock.stop("commit")
            if guard is not None:
                guard.drafted(float(kept.sum() / active.sum()), spent) if drafting else guard.plain(spent)
        longest = max(map(len, run.contexts))
        sequences = torch.tensor([[*row, *[pad_token] * (longest - len(row))] for row in run.contexts])
        return Generation(
            sequences=sequences,
            prompt_lengths=[len(p) for p in prompts],
            lengths=[len(row) for row in run.contexts],
            acceptance_lengths=lengths,
            tested=tested.tolist(),
            matched=matched.tolist(),
            pass_sizes=dict(pass_sizes),
            timings=clock.seconds | {"total": time.perf_counter() - began},
        )


@dataclass
class _Run:
    """Rows as they grow, and when they end."""

    contexts: list[list[int]]
    remaining: Tensor
    stop_tokens: tuple[int, ...]
    stop_strings: StopStrings | None
    on_tokens: OnTokens | None

    @property
    def done(self) -> bool:
        return not bool((self.remaining > 0).any())

    def roots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Last committed token of every row and its position."""
        roots = torch.tensor([row[-1] for row in self.contexts], device=device)
        return roots, torch.tensor([len(row) - 1 for row in self.contexts], device=device)

    def accept(self, tokens: Tensor, accepted: Tensor) -> Tensor:
        """Append what each row keeps of the emitted tokens, (B, L); returns the numbers kept, (B,)."""
        kept, ended = count_kept(tokens, self.stop_tokens, self.remaining)
        counts, drafted = kept.tolist(), accepted.tolist()
        for row, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            if self.stop_strings is not None and count:
                cut = self.stop_strings.cut(row, new[:count])
                if cut is not None:
                    counts[row], ended[row] = cut, True
            self.contexts[row] += new[: counts[row]]
            if self.on_tokens is not None and counts[row]:
                self.on_tokens(row, new[: counts[row]], [i < drafted[row] for i in range(counts[row])])
        kept = torch.tensor(counts, device=tokens.device)
        self.remaining = (self.remaining - kept).masked_fill(ended, 0)
        return kept


def _join(parts: list[tuple[States, Tensor, Tensor]]) -> tuple[States, Tensor, Tensor]:
    """Committed positions of several passes as those of one, the padding of every row behind its last."""
    if len(parts) == 1:
        return parts[0]
    states, following, counts = zip(*parts, strict=True)
    joined = States(torch.cat([s.features for s in states], 1), torch.cat([s.final for s in states], 1))
    tokens, total = torch.cat(following, 1), torch.stack(counts).sum(0)
    order = (tokens >= 0).long().argsort(dim=1, descending=True, stable=True)[:, : int(total.max())]
    return joined.gather(order), tokens.gather(1, order), total


def _pad(draft: Draft) -> Draft:
    """The draft with a multiple of 8 nodes; a root alone stays alone."""
    if isinstance(draft, SampledTree):
        return replace(draft, tree=pad_tree(draft.tree))
    return pad_tree(draft) if draft.tokens.shape[1] > 1 else draft


def _verify(draft: Draft, logits: Tensor, sampling: Sampling, seeds: Tensor, root_positions: Tensor) -> Verified:
    if isinstance(draft, SampledTree):
        return verify_sampled(draft, logits, sampling, seeds=seeds, root_positions=root_positions)
    if draft.tokens.shape[1] == 1:  # plain decoding pays for no walk
        drawn = sampling.draw(logits[:, 0], seeds, root_positions + 1).unsqueeze(1)
        path = torch.zeros_like(drawn)
        return Verified(path, drawn, path[:, 0], path[:, :0] > 0)
    return verify_matching(draft, logits, sampling, seeds=seeds, root_positions=root_positions)


def commit(cache: KVCache, states: States, verified: Verified, kept: Tensor) -> tuple[States, Tensor, Tensor]:
    """Commit the kept nodes; returns their states, the tokens that follow them, and their number.

    The root of the next tree, a row's last kept token, is not among them: the target has not seen it.
    """
    longest = max(int(kept.max()), 1)
    path, tokens = verified.path[:, :longest], verified.tokens[:, :longest]
    cache.commit(path, kept)
    beyond = torch.arange(longest, device=kept.device) >= kept.unsqueeze(1)
    return states.gather(path.clamp(min=0)), tokens.masked_fill(beyond, -1), kept
