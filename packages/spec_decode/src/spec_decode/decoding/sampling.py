"""Logit processors, and noise that is a pure function of seed and absolute position.

Everything is computed in float64, row by row. A draw depends only on the logits of its own row, the row's seed and the
position of the drawn token. So it is the same in plain and in speculative decoding.
Shapes: A rows of any kind, V tokens of the target's vocabulary.
"""

from enum import IntEnum

import torch
from torch import Tensor

from kd_common.checks import one_of
from kd_common.errors import UserError
from kd_common.sampling import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FINALIZER = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


class Stream(IntEnum):
    """Independent uses of the noise at one position."""

    TARGET = 0
    """Draws from the target's distribution, also a residual of it."""
    DRAFT = 1
    """Candidates drawn from the drafter's distribution."""
    ACCEPT = 2
    """Acceptance tests of such candidates."""


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Return the logical shift; int64 shifts copy the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _splitmix64(start: Tensor, index: Tensor) -> Tensor:
    """Return the output number `index`, counted from 0, of SplitMix64 started at `start`: 64 bits as int64, broadcast.

    References:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, figure 13.
    """
    bits = start + (index + 1) * _GOLDEN
    for shift, factor in _FINALIZER:
        bits = (bits ^ _shift_right(bits, shift)) * factor
    return bits ^ _shift_right(bits, 31)


def row_seeds(seed: int, batch: int) -> Tensor:
    """Return one seed per row, int64 of shape (B,); a row's seed does not depend on the size of the batch.

    Raises:
        UserError: For a seed that is no whole number of 64 bits.
    """
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must be a whole number in [-2^63, 2^63), got {seed}")
    return _splitmix64(torch.tensor(seed), torch.arange(batch))


def uniform_noise(seeds: Tensor, positions: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """Return the uniform numbers strictly between 0 and 1, a pure function of (seed, stream, position, id).

    Args:
        seeds: int64 of shape (...), one seed per row.
        positions: Absolute position of the token in question, int64, broadcast against the seeds.
        ids: Numbered items at one position, such as tokens of the vocabulary, int64 of shape (C,).
        stream: Use of the noise.

    Returns:
        float64 of shape (..., C), multiples of 2^-53.
    """
    key = _splitmix64(_splitmix64(seeds, torch.tensor(int(stream), device=seeds.device)), positions)
    bits = _splitmix64(key.unsqueeze(-1), ids)
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def gumbel_noise(seeds: Tensor, positions: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """Return standard Gumbel noise -log(-log(u)) from `uniform_noise`, with the same arguments and shape."""
    return uniform_noise(seeds, positions, ids, stream).log_().neg_().log_().neg_()


def gumbel_argmax(log_probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one draw per row from exp(log_probs) by the Gumbel-max rule with the noise of `Stream.TARGET`.

    Args:
        log_probs: Log-probabilities of shape (A, V) up to a constant per row; -inf is never drawn.
        seeds: int64 of shape (A,).
        positions: Absolute position of the drawn token, int64 of shape (A,).

    Returns:
        Tokens, int64 of shape (A,).
    """
    ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
    return (log_probs + gumbel_noise(seeds, positions, ids, Stream.TARGET)).argmax(-1)


def check_logits(logits: Tensor, present: Tensor | None = None) -> None:
    """Raise for rows of logits that define no distribution.

    Args:
        logits: Logits of shape (..., V).
        present: Boolean of shape (...); rows at False are not looked at.

    Raises:
        UserError: If a row holds NaN or +inf, or nothing but -inf.
    """
    broken = ~logits.amax(-1).isfinite()
    if present is not None:
        broken &= present
    if broken.any():
        raise UserError(
            f"logits of row {tuple(broken.nonzero()[0].tolist())} hold NaN or +inf, or are all -inf; check the model's "
            "weights and its dtype (float16 overflows where bfloat16 and float32 do not)"
        )


def _keep_largest(logits: Tensor, count: int | Tensor, smallest: Tensor) -> Tensor:
    """Return the logits with all but the `count` largest of each row, the last of which is `smallest`, at -inf."""
    above, tied = logits > smallest, logits == smallest
    places = count - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(-1) <= places))), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Set all but the k largest logits of each row to -inf; equal logits survive in the order of their token id."""
    if top_k >= logits.shape[-1]:
        return logits
    return _keep_largest(logits, top_k, logits.topk(top_k, dim=-1).values[..., -1:])


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Return the logits with all but the smallest set of likeliest tokens that reaches probability top_p at -inf.

    At least one token survives; ties go to the lower token id.
    """
    if top_p == 1:
        return logits
    log_total = logits.logsumexp(-1, keepdim=True)
    width = min(256, logits.shape[-1])
    while True:  # sorting a whole vocabulary costs as much as a pass of a small target
        ordered = logits.topk(width, dim=-1).values
        probs = (ordered - log_total).exp()
        if width == logits.shape[-1] or (probs.sum(-1) >= top_p).all():
            break
        width = min(4 * width, logits.shape[-1])
    count = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True)
    return _keep_largest(logits, count, ordered.gather(-1, count - 1))


class Sampling(SamplingParams):
    """Processors that turn logits into the distribution of the next token: temperature, then top-k, then top-p.

    Of several equal logits the one of the lowest token id comes first.

    Raises:
        UserError: If a setting is out of range, or one that is not known here.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("no_repeat_ngram_size", self.no_repeat_ngram_size, (0,))

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of the processed distribution.

        Args:
            logits: Logits of shape (..., V) in any floating dtype; -inf excludes a token.

        Returns:
            Normalised float64 log-probabilities of shape (..., V), -inf at excluded tokens.

        Raises:
            UserError: If a row holds NaN or +inf, or nothing but -inf.
        """
        check_logits(logits)
        if self.temperature == 0:
            log_probs = torch.full_like(logits, -torch.inf, dtype=torch.float64)
            return log_probs.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        return self._processed(logits).log_softmax(-1)

    def _processed(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities up to a constant per row, at a temperature > 0."""
        # The largest logit becomes 0 first: no temperature, however small, can overflow it.
        logits = (logits.double() - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        return keep_top_p(logits, self.top_p)

    def draw(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Draw one token per row from the processed distribution.

        Plain decoding and `verify_matching` both draw here.

        Args:
            logits: Logits of shape (A, V).
            seeds: int64 of shape (A,).
            positions: Absolute position of the drawn token, int64 of shape (A,).

        Returns:
            Tokens, int64 of shape (A,).

        Raises:
            UserError: If a row holds NaN or +inf, or nothing but -inf.
        """
        check_logits(logits)
        if self.temperature == 0:  # the noise cannot change this draw
            return logits.argmax(-1)
        return gumbel_argmax(self._processed(logits), seeds, positions)  # which a constant per row does not change
