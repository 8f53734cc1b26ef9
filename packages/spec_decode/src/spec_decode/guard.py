"""Stop drafting where it does not pay after all: the online half of `tree="auto"`."""

from dataclasses import dataclass, field


@dataclass
class PayGuard:
    """Keeps an account of the seconds that drafting has saved, and lets it draft while the account is not empty.

    `tree="auto"` chooses by the acceptance on validation text and by times measured beforehand; other text, or a
    machine that has changed its speed, can make drafting slower than plain decoding. The account starts full. A drafted
    pass adds what it saved, or takes what it lost; when nothing is left, the rest of the generation is decoded plainly.
    Plain passes pay in a small share of their time, and drafting is tried again when the account is half full. So
    drafting costs at most the first filling and that share, while a drafter that pays is rarely stopped by bad luck:
    with a mean gain m and a standard deviation s per pass about exp(-2 m `most` / s^2) of the times.

    Args:
        plain_seconds: Seconds of a target pass of plain decoding, which yields one token per row.
        most: What the account holds at most, in plain passes, > 0.
        share: Share of the time of plain passes that is paid in, in (0, 1).
    """

    plain_seconds: float
    most: float = 8.0
    share: float = 0.01
    _saved: float = field(init=False)
    _stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._saved = self.most

    def begin(self) -> bool:
        """Whether the generation that starts now should draft."""
        self._stopped = self._stopped and self._saved < self.most / 2
        return not self._stopped

    def pays(self, tokens: float, seconds: float) -> bool:
        """Count a drafted pass; whether to go on drafting.

        Args:
            tokens: Tokens that the pass yielded per row.
            seconds: Seconds of its draft and its target pass.
        """
        self._saved = min(self._saved + tokens - seconds / self.plain_seconds, self.most)
        self._stopped = self._saved <= 0
        return not self._stopped

    def plain(self) -> None:
        """Count a plain pass."""
        self._saved = min(self._saved + self.share, self.most)
