"""Stop drafting where it does not pay after all, and come back where it does: the online half of `tree="auto"`."""

from dataclasses import dataclass, field


@dataclass
class PayGuard:
    """Keeps an account of the seconds that drafting has saved, and lets it draft while the account is not empty.

    `tree="auto"` chooses by the acceptance on validation text and by times measured beforehand; other text, or a
    machine that has changed its speed, can make drafting slower than plain decoding. A drafted pass adds what it saved,
    or takes what it lost; when nothing is left, decoding goes on plainly. Plain passes pay in a small share of their
    time, and each time this has bought `stake` passes, drafting is tried again. So drafting costs at most the first
    filling and that share. With a mean gain m and a standard deviation s per pass, a try from x passes ends in the red
    with a probability of about exp(-2 m x / s^2): a small stake fails more often, but is as much more often there.

    Args:
        plain_seconds: Seconds of a target pass of plain decoding, which yields one token per row.
        first: What the account holds at the beginning, in plain passes, > 0.
        most: What it holds at most, >= `first`: the memory of a drafter that has paid.
        stake: What it must hold to draft again, > 0.
        share: Share of the time of plain passes that is paid in, in (0, 1).
    """

    plain_seconds: float
    first: float = 4.0
    most: float = 8.0
    stake: float = 0.5
    share: float = 0.015
    _saved: float = field(init=False)
    _drafting: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._saved = self.first

    def drafts(self) -> bool:
        """Whether the next pass should draft."""
        self._drafting = self._drafting or self._saved >= self.stake
        return self._drafting

    def drafted(self, tokens: float, seconds: float) -> None:
        """Count a drafted pass.

        Args:
            tokens: Tokens that the pass yielded per row.
            seconds: Seconds of its draft and its target pass.
        """
        self._saved = min(self._saved + tokens - seconds / self.plain_seconds, self.most)
        self._drafting = self._saved > 0

    def plain(self) -> None:
        """Count a plain pass."""
        self._saved = min(self._saved + self.share, self.most)
