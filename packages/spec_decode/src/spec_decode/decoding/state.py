"""Decoding state of a batch: its growing rows, the caches, and the tokens that the drafter has not read yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spec_decode.decoding.sampling import Sampling
from spec_decode.decoding.speed_monitor import SpeedMonitor
from spec_decode.decoding.statistics import Clock, Generation, Statistics
from spec_decode.decoding.stopping import StopStrings
from spec_decode.decoding.verify import Verified, count_kept
from spec_decode.models import KVCache, States

OnTokens = Callable[[int, list[int], list[bool]], None]
"""Callback that receives a row, its new tokens, and whether each was drafted."""


class Rows:
    """Growing rows of a batch and their ends.

    Args:
        prompts: Tokens of each prompt.
        limits: Most tokens to add to each.
        device: Where to count.
        stop_tokens: Tokens that end a row.
        stop_strings: Watches for texts that end a row.
        on_tokens: Called for every row that got new tokens.

    Attributes:
        contexts: Committed tokens of each row.
        remaining: Tokens that each row may still get, int64 of shape (B,); 0 once it is finished.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        device: torch.device,
        *,
        stop_tokens: Sequence[int] = (),
        stop_strings: StopStrings | None = None,
        on_tokens: OnTokens | None = None,
    ) -> None:
        self.contexts = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.remaining = torch.tensor(limits, device=device)
        self._stop_tokens, self._stop_strings, self._on_tokens = tuple(stop_tokens), stop_strings, on_tokens

    @property
    def done(self) -> bool:
        """Return whether every row is finished."""
        return not bool((self.remaining > 0).any())

    def roots(self) -> tuple[Tensor, Tensor]:
        """Return the last committed token of every row and its position."""
        device = self.remaining.device
        roots = torch.tensor([row[-1] for row in self.contexts], device=device)
        return roots, torch.tensor([len(row) - 1 for row in self.contexts], device=device)

    def accept(self, tokens: Tensor, accepted: Tensor) -> Tensor:
        """Append each row's kept part of the emitted tokens, (B, L); return the numbers kept, (B,)."""
        kept, ended = count_kept(tokens, self._stop_tokens, self.remaining)
        counts, drafted = kept.tolist(), accepted.tolist()
        for row, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            if self._stop_strings is not None and count:
                cut = self._stop_strings.cut(row, new[:count])
                if cut is not None:
                    counts[row], ended[row] = cut, True
            self.contexts[row] += new[: counts[row]]
            if self._on_tokens is not None and counts[row]:
                self._on_tokens(row, new[: counts[row]], [i < drafted[row] for i in range(counts[row])])
        kept = torch.tensor(counts, device=tokens.device)
        self.remaining = (self.remaining - kept).masked_fill(ended, 0)
        return kept

    def padded(self, pad_token: int) -> Tensor:
        """Return the prompts and new tokens, int64 of shape (B, L), padded behind each row's end."""
        longest = max(map(len, self.contexts))
        return torch.tensor([[*row, *[pad_token] * (longest - len(row))] for row in self.contexts])


class Committed(NamedTuple):
    """Positions that the target has read and committed.

    Args:
        states: The target's states there, shapes (B, m, .).
        next_tokens: Token that follows each, int64 of shape (B, m), -1 beyond `counts`.
        counts: Number of these positions, int64 of shape (B,).
    """

    states: States
    next_tokens: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Return the mean number of positions over the rows that have any."""
        return float(self.counts.sum() / (self.counts > 0).sum())

    @classmethod
    def join(cls, parts: Sequence["Committed"]) -> "Committed":
        """Join the positions of several passes into one pass, with the padding of every row at its end."""
        if len(parts) == 1:
            return parts[0]
        states, following, counts = zip(*parts, strict=True)
        joined = States(torch.cat([s.features for s in states], 1), torch.cat([s.final for s in states], 1))
        tokens, total = torch.cat(following, 1), torch.stack(counts).sum(0)
        order = (tokens >= 0).long().argsort(dim=1, descending=True, stable=True)[:, : int(total.max())]
        return cls(joined.gather(order), tokens.gather(1, order), total)


@dataclass
class DecodingState:
    """State of one generation.

    Attributes:
        rows: The rows.
        sampling: The target's processors.
        seeds: One seed per row, int64 of shape (B,).
        cache: Keys and values of the target.
        draft_cache: Cache of the drafter for the batch.
        monitor: Decides whether a pass drafts; None always drafts.
        clock: Seconds by phase.
        statistics: Statistics of the passes.
        unread: Committed positions that the drafter has not seen.
    """

    rows: Rows
    sampling: Sampling
    seeds: Tensor
    cache: KVCache
    draft_cache: Any
    monitor: SpeedMonitor | None
    clock: Clock
    statistics: Statistics
    unread: list[Committed] = field(default_factory=list)

    def commit(self, passed: States, verified: Verified) -> Committed:
        """Keep the verified tokens up to a stop or a limit.

        The root of the next tree, a row's last kept token, is not among the committed ones: the target has not seen it.
        """
        kept = self.rows.accept(verified.tokens, verified.accepted)
        self.statistics.record(passed.final.shape[1], verified, kept)
        longest = max(int(kept.max()), 1)
        path, tokens = verified.path[:, :longest], verified.tokens[:, :longest]
        self.cache.commit(path, kept)
        beyond = torch.arange(longest, device=kept.device) >= kept.unsqueeze(1)
        return Committed(passed.gather(path.clamp(min=0)), tokens.masked_fill(beyond, -1), kept)

    def finish(self, pad_token: int) -> Generation:
        """Return the generated tokens and their statistics."""
        statistics = self.statistics
        return Generation(
            sequences=self.rows.padded(pad_token),
            prompt_lengths=self.rows.prompt_lengths,
            lengths=[len(row) for row in self.rows.contexts],
            acceptance_lengths=statistics.acceptance_lengths,
            tested=statistics.tested.tolist(),
            matched=statistics.matched.tolist(),
            pass_sizes=dict(statistics.pass_sizes),
            timings=self.clock.timings(),
        )
