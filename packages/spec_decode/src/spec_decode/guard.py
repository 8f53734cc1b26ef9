"""Stop drafting where it does not pay after all: the online half of `tree="auto"`."""

from dataclasses import dataclass, field


@dataclass
class PayGuard:
    """Compares the passes of a generation with plain decoding, window by window, and remembers how it went.

    `tree="auto"` chooses by the acceptance on validation text and by times measured beforehand; other text, or a
    machine that has changed its speed, can make drafting slower than plain decoding. After a window that did not pay
    the rest of the generation is decoded plainly. So are the next 1, 3, 7, ... generations, more with every failure in
    a row, so that the windows lost to a drafter that never pays become a vanishing share.

    Args:
        plain_seconds: Seconds of a target pass of plain decoding, which yields one token per row.
        window: Passes per decision, >= 1.
    """

    plain_seconds: float
    window: int = 12
    failures: int = field(default=0, init=False)
    _skip: int = field(default=0, init=False)
    _passes: int = field(default=0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)

    def begin(self) -> bool:
        """Whether the generation that starts now should draft; short generations share a window."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def pays(self, tokens: float, seconds: float) -> bool:
        """Count one pass; whether to go on drafting.

        Args:
            tokens: Tokens that the pass yielded per row.
            seconds: Seconds of its draft and its target pass.
        """
        self._passes, self._tokens, self._seconds = self._passes + 1, self._tokens + tokens, self._seconds + seconds
        if self._passes < self.window:
            return True
        paid = self._tokens * self.plain_seconds >= self._seconds
        self._passes, self._tokens, self._seconds = 0, 0.0, 0.0
        self.failures = 0 if paid else self.failures + 1
        self._skip = 0 if paid else 2**self.failures - 1
        return paid
