"""Online half of automatic tuning: stop drafting where it does not pay, and resume where it does."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median


@dataclass
class SpeedMonitor:
    """Balance, in plain passes, of the time that drafting has saved; drafting needs a positive balance.

    `SpeculativeDecoder.tuned` chooses by acceptance on validation text and by measured times. Other text, or a change
    of the machine's speed, can make drafting slower than plain decoding. The monitor keeps a balance: a drafted pass
    adds its gain or subtracts its loss. When the balance is empty, decoding continues plainly. Plain passes add a small
    share of their time. Once the balance holds `retry` passes, drafting is tried again. So drafting costs at most the
    initial balance and that share.

    The time of a plain pass is a median over recent plain passes of the generation that followed another plain one.
    While drafting continues, the second of two plain passes in every `interval` counts. The first may have to reload
    weights, as drafted passes read a packed copy that evicts them from the processor's cache. Earlier generations do
    not count, because the machine may have been faster or slower. A stalled pass is charged at most `max_charge` times
    the recent time of drafted passes.

    Args:
        initial: Initial balance, > 0.
        limit: Largest balance, >= `initial`; a drafter that has paid can lose this much.
        retry: Balance at which drafting is tried again, > 0.
        saving: Share of the time of plain passes that is paid in, in (0, 1).
        interval: Passes of which two are plain, >= 3.
        warmup: Plain passes that are timed in every generation before it drafts, >= 1.
        window: Largest number of passes, plain or drafted, in a median, >= `warmup`.
        max_charge: Most that a drafted pass is charged, in medians of the last `window` ones, >= 1.
    """

    initial: float = 4.0
    limit: float = 8.0
    retry: float = 0.5
    saving: float = 0.015
    interval: int = 128
    warmup: int = 3
    window: int = 5
    max_charge: float = 2.0
    _saved: float = field(init=False)
    _plain: deque[float] = field(init=False)
    _costs: deque[float] = field(init=False)
    _drafting: bool = field(default=True, init=False)
    _passes: int = field(default=0, init=False)
    _warm: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._saved = self.initial
        self._plain, self._costs = deque(maxlen=self.window), deque(maxlen=self.window)

    def begin(self) -> None:
        """Start a generation.

        The prefill processes many rows, and the machine's present speed is unknown.
        """
        self._warm = False
        self._plain.clear()

    def drafts(self) -> bool:
        """Return whether the next pass should draft."""
        self._passes += 1
        self._drafting = self._drafting or self._saved >= self.retry
        return self._drafting and len(self._plain) >= self.warmup and self._passes % self.interval > 1

    def drafted(self, tokens: float, seconds: float) -> None:
        """Count a drafted pass.

        Args:
            tokens: Tokens that the pass yielded per row.
            seconds: Seconds of its draft, its target pass and its verification.
        """
        self._warm = False
        cost = seconds / median(self._plain)
        most = self.max_charge * median(self._costs) if len(self._costs) == self.window else cost
        self._costs.append(cost)
        self._saved = min(self._saved + tokens - min(cost, most), self.limit)
        self._drafting = self._saved > 0

    def plain(self, seconds: float) -> None:
        """Count a plain pass, which yields one token per row.

        Args:
            seconds: Seconds of its target pass and its draw.
        """
        if self._warm:
            self._plain.append(seconds)
        self._warm = True
        self._saved = min(self._saved + self.saving, self.limit)
