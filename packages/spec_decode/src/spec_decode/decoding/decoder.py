"""Speculative decoding of a batch: draft, one target pass over the tree, verification, commit.

Plain decoding is the same loop with a tree of the root alone. Proofs and tests that the drafter does not change what is
emitted: docs/spec_exactness.md. Shapes: B rows, n nodes, D levels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_common.checks import within
from kd_common.errors import UserError
from spec_decode.decoding.autotune import autotune
from spec_decode.decoding.inputs import check_length, check_whole, prompt_lists
from spec_decode.decoding.proposals import SampledTree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.speed_monitor import SpeedMonitor
from spec_decode.decoding.state import Committed, DecodingState, OnTokens, Rows
from spec_decode.decoding.statistics import Clock, Generation, Statistics
from spec_decode.decoding.stopping import StopStrings
from spec_decode.decoding.tree import DraftTree, pad_tree, root_tree
from spec_decode.decoding.verify import Verified, verify
from spec_decode.drafters.base import Draft, DraftContext, Drafter, DynamicTree, TreeShape, tree_depth, tree_slots
from spec_decode.models import CausalLM

OnPass = Callable[[DraftTree, Verified], None]
"""Callback that receives the tree of every target pass and its verification."""


class SpeculativeDecoder:
    """Lossless generation with a target and a drafter.

    Args:
        target: Step runner of the target.
        drafter: Drafter for this target; None decodes plainly.
        tree: Candidates per level, such as (3, 2, 1), or a `DynamicTree`, for drafters that can. None means a chain of
            all the drafter's levels, of its `chain_depth` where it has no limit; `tuned` chooses by measurement.
        rejection: Whether to draw candidates from the drafter's distribution and verify by recursive rejection. The
            default, sample-and-match, emits exactly the tokens of plain decoding with the same seed.
        min_confidence: Leave out nodes that the drafter reaches with a smaller probability, in [0, 1). This is the
            product of its probabilities along the path, given the noise. 0 keeps all nodes.
        compile: Compile the target's passes (`CausalLM.compile_steps`): seconds to minutes for the first of every size.
        tokenizer: Needed for stop strings only.

    Raises:
        UserError: If the drafter cannot draft such a tree or cannot sample.
    """

    def __init__(
        self,
        target: CausalLM,
        drafter: Drafter | None = None,
        *,
        tree: Sequence[int] | DynamicTree | None = None,
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
        self.monitors: defaultdict[int, SpeedMonitor] | None = None  # by number of rows
        if drafter is None:
            self.tree = ()
        elif tree is None:
            self.tree = (1,) * (drafter.capabilities.max_depth or drafter.capabilities.chain_depth)
        else:
            self.tree = tree if isinstance(tree, DynamicTree) else tuple(tree)
        self.rejection, self.min_confidence = rejection, min_confidence
        self._check()

    @classmethod
    def tuned(cls, target: CausalLM, drafter: Drafter | None, **settings: Any) -> "SpeculativeDecoder":
        """Return a decoder with the tree of most expected tokens per second here for one row, if drafting pays.

        It measures this machine first. While decoding it returns to plain decoding whenever that is faster
        (`SpeedMonitor`).

        Args:
            target: Step runner of the target.
            drafter: Drafter for this target; without one there is nothing to tune.
            **settings: Further arguments of the class, except the tree.
        """
        decoder = cls(target, drafter, **settings)
        if drafter is not None:
            decoder.tree, decoder.monitors = autotune(target, drafter).branching, defaultdict(SpeedMonitor)
            decoder._check()
        return decoder

    def _check(self) -> None:
        drafter, shape = self.drafter, self.tree
        if drafter is None:
            return
        name, can = type(drafter).__name__, drafter.capabilities
        if not drafter.serves(self.target):
            raise UserError(f"this {name} was built for another target; build or load it with the one it drafts for")
        if isinstance(shape, tuple) and any(type(w) is not int or w < 1 for w in shape):
            raise UserError(f"every level of the tree needs a number of candidates >= 1, got {shape}")
        if isinstance(shape, DynamicTree) and not can.dynamic:
            raise UserError(f"{name} cannot draft a dynamic tree; give the candidates per level")
        widest = shape.top_k if isinstance(shape, DynamicTree) else max(shape, default=1)
        if can.max_width is not None and widest > can.max_width:
            raise UserError(f"{name} has {can.max_width} candidates for a level, the tree asks for {widest}")
        if can.max_depth is not None and tree_depth(shape) > can.max_depth:
            raise UserError(f"{name} drafts at most {can.max_depth} levels, the tree has {tree_depth(shape)}")
        within("min_confidence", self.min_confidence, "[0, 1)")
        if self.min_confidence and not can.confident:
            raise UserError(f"the drafts of {name} have no probabilities; leave min_confidence at 0")
        if self.min_confidence and self.rejection:
            raise UserError("choosing among drawn candidates changes their distribution; leave min_confidence at 0")
        if self.rejection and not can.samples:
            raise UserError(f"{name} does not draw its candidates; leave rejection off (sample-and-match)")
        if self.rejection and isinstance(shape, DynamicTree):
            raise UserError("a dynamic tree ranks its candidates, so they are no draws; leave rejection off")

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
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
            UserError: For an empty prompt, one that fills the context, a token outside the vocabulary, a setting out of
                range, or logits that are NaN.
        """
        prompts = prompt_lists(input_ids, attention_mask, self.target.vocab_size, self.target.context)
        check_length(max_new_tokens)
        check_whole("stop_tokens", *stop_tokens)
        rows = Rows(
            prompts,
            [min(self.target.context - len(p), max_new_tokens or self.target.context) for p in prompts],
            self.target.device,
            stop_tokens=stop_tokens,
            stop_strings=StopStrings(stop_strings, self.tokenizer, len(prompts)) if stop_strings else None,
            on_tokens=on_tokens,
        )
        state = self._start(rows, Sampling(temperature, top_k, top_p), seed)
        clock, monitor = state.clock, state.monitor

        # 1. Prefill: the target reads the prompts and draws a first token for every row.
        clock.start()
        state.unread.append(self._prefill(state))
        clock.stop("prefill")

        while not rows.done:
            roots, positions = rows.roots()
            drafting = bool(self.tree) and (monitor is None or monitor.drafts())

            # 2. Draft: the drafter proposes a tree below the last token of every row.
            draft = self._draft(state, roots, positions) if drafting else root_tree(roots)
            tree = draft.tree if isinstance(draft, SampledTree) else draft
            seconds = clock.stop("draft")

            # 3. Target: one pass over all nodes.
            logits, passed = self.target.tree_logits(tree, state.cache)
            seconds += clock.stop("target")

            # 4. Verify: the longest path of the tree that the target draws itself, and one more token.
            verified = verify(draft, logits, state.sampling, seeds=state.seeds, root_positions=positions)
            seconds += clock.stop("verify")

            # 5. Commit: the rows grow, the cache keeps the path.
            committed = state.commit(passed, verified)
            if self.tree:
                state.unread.append(committed)
            if on_pass is not None:
                on_pass(tree, verified)
            clock.stop("commit")
            if monitor is not None:
                monitor.drafted(committed.mean, seconds) if drafting else monitor.plain(seconds)
        return state.finish(pad_token)

    def _start(self, rows: Rows, sampling: Sampling, seed: int) -> DecodingState:
        """Return the state before the prompts are read, with caches for all that the rows may become."""
        batch, device = len(rows.contexts), self.target.device
        limits: list[int] = rows.remaining.tolist()
        seeds = row_seeds(seed, batch).to(device)
        longest = max(length + limit for length, limit in zip(rows.prompt_lengths, limits, strict=True))
        capacity = longest + tree_slots(self.tree)
        monitor = None if self.monitors is None else self.monitors[batch]
        if monitor is not None:
            monitor.begin()
        # A drafter reads the tokens of plain passes at once, padded to the longest run.
        missed = max(limits) if monitor is not None and batch > 1 else 0
        return DecodingState(
            rows=rows,
            sampling=sampling,
            seeds=seeds,
            cache=self.target.new_cache(batch, capacity),
            draft_cache=self.drafter.new_cache(batch, capacity + missed) if self.drafter and self.tree else None,
            monitor=monitor,
            clock=Clock(device),
            statistics=Statistics(batch, tree_depth(self.tree)),
        )

    def _prefill(self, state: DecodingState) -> Committed:
        prompts, lengths, device = state.rows.contexts, state.rows.prompt_lengths, self.target.device
        counts, width = torch.tensor(lengths, device=device), max(lengths)
        padded = torch.tensor([[*p, *[-1] * (width - len(p))] for p in prompts], device=device)
        states = self.target.prefill(padded, counts, state.cache)
        last = self.target.logits(states.final[torch.arange(len(prompts), device=device), counts - 1])
        first = state.sampling.draw(last, state.seeds, counts).unsqueeze(1)
        state.rows.accept(first, torch.zeros_like(counts))
        following = F.pad(padded[:, 1:], (0, 1), value=-1).scatter(1, counts.unsqueeze(1) - 1, first)
        return Committed(states, following, counts)

    def _draft(self, state: DecodingState, roots: Tensor, positions: Tensor) -> Draft:
        """Return the drafter's tree with its nodes padded to a multiple of 8; a root alone stays alone."""
        assert self.drafter is not None
        read = Committed.join(state.unread)
        state.unread.clear()
        draft = self.drafter.propose(
            DraftContext(
                contexts=state.rows.contexts,
                root=roots,
                root_positions=positions,
                states=read.states,
                next_tokens=read.next_tokens,
                counts=read.counts,
                tree=self.tree,
                sampling=state.sampling,
                seeds=state.seeds,
                rejection=self.rejection,
                cache=state.draft_cache,
                min_confidence=self.min_confidence,
            )
        )
        if isinstance(draft, SampledTree):
            return replace(draft, tree=pad_tree(draft.tree), check=False)
        return pad_tree(draft) if draft.tokens.shape[1] > 1 else draft
