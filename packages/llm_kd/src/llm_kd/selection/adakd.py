"""AdaKD: the hardest tokens, their share following the loss, each with its own temperature."""

import math
from typing import Any

import torch
from torch import Tensor

from kd_common.checks import at_least, within
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.selection.base import Selection, Selector, dense_logits, top_share


class AdaKD(Selector):
    """Keep the share r of tokens with the largest Hellinger distance s; factor exp(-c tanh(log(s / median))) on T.

    Hard tokens get a low temperature: the median is taken over the kept tokens, the lower of two. The scores carry no
    gradient.

    The share r starts at 1 and is fixed during the warm-up; at its end the loss's running mean becomes the reference.
    Later, when the mean has fallen more than `tolerance` below the reference, r is multiplied by 1 - rate. When it has
    risen as much, r is multiplied by 1 + rate. In both cases the mean is the new reference.

    Tokens compete within one call of the head: one micro-batch on one rank.

    Args:
        c: Strength of the temperature's adaptation, >= 0; 0 keeps one temperature.
        tolerance: Relative change epsilon of the loss that moves the share, >= 0.
        rate: Relative change sigma of the share, in [0, 1).
        min_share: Smallest share of tokens, in (0, 1].
        warmup: Share of training before the loss is followed, in [0, 1).
        ema: Decay of the loss's running mean, in [0, 1).

    Raises:
        ValueError: If a setting is out of its range.

    References:
        AdaKD (AAAI 2026): loss-driven token focusing and inverse-difficulty temperature scaling.
    """

    per_row = False

    def __init__(
        self,
        c: float = 0.5,
        tolerance: float = 0.05,
        rate: float = 0.05,
        min_share: float = 0.1,
        warmup: float = 0.05,
        ema: float = 0.99,
    ) -> None:
        super().__init__()
        at_least("c", c, 0)
        at_least("tolerance", tolerance, 0)
        for name, value in {"rate": rate, "warmup": warmup, "ema": ema}.items():
            within(name, value, "[0, 1)")
        within("min_share", min_share, "(0, 1]")
        self.c = c
        self.tolerance = tolerance
        self.rate = rate
        self.min_share = min_share
        self.warmup = warmup
        self.ema = ema
        self.share = 1.0
        self.mean_loss: float | None = None
        self.reference: float | None = None

    def score(self, student_logits: Tensor, teacher_logits: Tensor | TruncatedDistribution) -> Tensor:
        """Return the Hellinger distance of q and p, in [0, 1]."""
        root_q, root_p = ((0.5 * z.log_softmax(dim=-1)).exp() for z in (student_logits, dense_logits(teacher_logits)))
        return torch.linalg.vector_norm(root_q - root_p, dim=-1) / math.sqrt(2)

    def select(self, score: Tensor, noise: Tensor | None = None) -> Selection:
        """Return the hardest tokens of the batch, with their temperatures."""
        if not len(score):
            return Selection(score, score)
        kept = top_share(score, self.share)
        log_score = score.clamp(min=torch.finfo(score.dtype).tiny).log()
        median = log_score[kept > 0].median()
        return Selection(kept, kept, torch.exp(-self.c * torch.tanh(log_score - median)))

    def on_step(self, loss: float, step: int, total_steps: int) -> None:
        """Adapt the share of tokens to the loss after an optimizer step.

        Raises:
            ValueError: If the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"AdaKD follows the training loss, which is {loss} after step {step}")
        self.mean_loss = loss if self.mean_loss is None else self.ema * self.mean_loss + (1 - self.ema) * loss
        if step < self.warmup * total_steps:
            return
        if self.reference is None:
            self.reference = self.mean_loss
        fall = self.reference - self.mean_loss
        if abs(fall) > self.tolerance * self.reference:
            factor = 1 - self.rate if fall > 0 else 1 + self.rate
            self.share = min(max(self.share * factor, self.min_share), 1.0)
            self.reference = self.mean_loss

    def get_extra_state(self) -> dict[str, float | None]:
        """Return the state for a checkpoint: share, running mean and reference."""
        return {"share": self.share, "mean_loss": self.mean_loss, "reference": self.reference}

    def set_extra_state(self, state: Any) -> None:
        """Restore the state of `get_extra_state`."""
        self.share, self.mean_loss, self.reference = state["share"], state["mean_loss"], state["reference"]
