"""Streaming gradient signal-to-noise ratio (GSNR) of named gradient components."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Gradients = Tensor | Sequence[Tensor | None]


@dataclass
class _Moments:
    """Weighted mean and (biased) variance of a stream of gradient lists."""

    mean: list[Tensor]
    variance: list[Tensor]
    count: int = 0
    weight: float = 0.0  # sum of the weights d^(n - i)
    squares: float = 0.0  # sum of the squared normalised weights

    @classmethod
    def zeros_like(cls, tensors: Sequence[Tensor]) -> "_Moments":
        def zeros() -> list[Tensor]:
            return [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]

        return cls(mean=zeros(), variance=zeros())

    def add(self, gradients: list[Tensor], decay: float) -> None:
        self.count += 1
        self.weight = decay * self.weight + 1
        share = 1 / self.weight
        self.squares = (1 - share) ** 2 * self.squares + share**2
        deviation = torch._foreach_sub(gradients, self.mean)
        torch._foreach_add_(self.mean, deviation, alpha=share)
        torch._foreach_addcmul_(self.variance, deviation, deviation, value=share)
        torch._foreach_mul_(self.variance, 1 - share)


class GradientSNR:
    """Streaming estimator of the gradient signal-to-noise ratio of named gradient components.

    Two forms, with mean and variance over the samples (mini-batches):

    * per parameter: GSNR_j = E[g_j]^2 / Var[g_j];
    * vector: ||E g||^2 / E||g - E g||^2.

    Memory is constant: a mean and a variance buffer per component, in at least float32 (a second pair with a window).
    Each sample i of n has the weight d^(n - i), normalised to sum to 1; d = 1 without decay. The variance is made
    unbiased by the factor 1 / (1 - sum of squared normalised weights), which is n / (n - 1) for equal weights. The
    squared mean is the plug-in estimate: pure noise has an expected vector GSNR of that sum of squares (1 / n), not 0.

    Args:
        window: Number W >= 2 of samples in a tumbling window: statistics are those of the last W completed samples,
            and of the samples so far until the first window is full. None uses all samples since the last reset.
        decay: Factor d in (0, 1) for exponentially decaying weights. At most one of window and decay.
        unbiased: Whether to correct the variance as above.

    Raises:
        ValueError: If window or decay is out of its range, or both are given.

    Example:
        >>> snr = GradientSNR()
        >>> for gradient in ([1.0, 2.0], [3.0, 2.0]):
        ...     snr.update({"task": torch.tensor(gradient)})
        >>> snr.vector("task")
        4.0

    References:
        DeepKD, arXiv 2505.15133; GSNR: arXiv 2001.07384.
    """

    def __init__(self, *, window: int | None = None, decay: float | None = None, unbiased: bool = True) -> None:
        if window is not None and decay is not None:
            raise ValueError("window and decay exclude each other: give at most one of them")
        if window is not None and window < 2:
            raise ValueError(f"window must be at least 2 samples, got {window}: a variance needs two")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}; leave it out for equal weights")
        self.window = window
        self.decay = decay
        self.unbiased = unbiased
        self._running: dict[str, _Moments] = {}
        self._completed: dict[str, _Moments] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Gradients]) -> None:
        """Add one sample to each component given; the gradients are read, never kept.

        Args:
            gradients: Per component a gradient or a sequence of them, with the same shapes in every call. None stands
                for zeros, from the second sample of the component on.

        Raises:
            ValueError: If a component is empty, its shapes change, or its first sample contains None.
        """
        for name, value in gradients.items():
            self._add(name, [value] if isinstance(value, Tensor) else list(value))

    def _add(self, name: str, sample: list[Tensor | None]) -> None:
        known = self._running.get(name) or self._completed.get(name)
        if known is not None:
            if len(sample) != len(known.mean):
                raise ValueError(f"component {name!r} had {len(known.mean)} gradients before, now {len(sample)}")
            sample = [torch.zeros_like(m) if g is None else g for g, m in zip(sample, known.mean, strict=True)]
        tensors = [g for g in sample if g is not None]
        if not tensors or len(tensors) < len(sample):
            raise ValueError(
                f"the first sample of component {name!r} is empty or contains None, whose shape is not known yet; "
                "pass zeros there or leave these parameters out"
            )
        if known is not None and any(g.shape != m.shape for g, m in zip(tensors, known.mean, strict=True)):
            raise ValueError(f"the gradients of component {name!r} changed shape; call reset() for a new model")
        if name not in self._running:
            self._running[name] = _Moments.zeros_like(tensors)
        moments = self._running[name]
        # Loaded statistics lie where the checkpoint was mapped to; the gradients show where they belong.
        moments.mean = [m.to(g.device) for m, g in zip(moments.mean, tensors, strict=True)]
        moments.variance = [v.to(g.device) for v, g in zip(moments.variance, tensors, strict=True)]
        moments.add(tensors, 1.0 if self.decay is None else self.decay)
        if moments.count == self.window:
            self._completed[name] = self._running.pop(name)

    def _moments(self, name: str) -> _Moments:
        """Return the moments that the statistics of a component rest on."""
        moments = self._completed.get(name) or self._running.get(name)
        if moments is None:
            raise KeyError(f"no gradient of component {name!r} was recorded; recorded: {self.names}")
        return moments

    def _variance(self, name: str) -> list[Tensor]:
        moments = self._moments(name)
        if moments.count < 2:
            raise RuntimeError(f"the GSNR of component {name!r} needs at least 2 samples, got {moments.count}")
        return list(torch._foreach_div(moments.variance, 1 - moments.squares if self.unbiased else 1.0))

    @property
    def names(self) -> list[str]:
        """Names of the components recorded since the last reset."""
        return list(dict.fromkeys([*self._completed, *self._running]))

    def count(self, name: str) -> int:
        """Return the number of samples that the statistics of a component rest on; 0 for a component never recorded."""
        return self._moments(name).count if name in self.names else 0

    def per_parameter(self, name: str) -> list[Tensor]:
        """Return GSNR_j = E[g_j]^2 / Var[g_j] of every entry.

        Args:
            name: Component.

        Returns:
            New tensors in the shapes of the gradients; inf where the variance is 0, NaN where the mean is 0 too.

        Raises:
            KeyError: If the component was never recorded.
            RuntimeError: If it has fewer than two samples.
        """
        variance = self._variance(name)
        return [m.square() / v for m, v in zip(self._moments(name).mean, variance, strict=True)]

    def mean(self, name: str) -> float:
        """Average of the per-parameter GSNR over the entries whose variance is not zero; NaN if there are none.

        Raises:
            KeyError: If the component was never recorded.
            RuntimeError: If it has fewer than two samples.
        """
        noisy = [v > 0 for v in self._variance(name)]
        entries = sum(int(n.sum()) for n in noisy)
        total = sum(float(r[n].sum()) for r, n in zip(self.per_parameter(name), noisy, strict=True))
        return total / entries if entries else math.nan

    def vector(self, name: str) -> float:
        """Return the vector GSNR ||E g||^2 / E||g - E g||^2; inf without noise, NaN if the mean is zero too.

        Raises:
            KeyError: If the component was never recorded.
            RuntimeError: If it has fewer than two samples.
        """
        return self._summary(name)["vector"]

    def _summary(self, name: str) -> dict[str, float]:
        noise = sum(float(v.sum()) for v in self._variance(name))
        signal = sum(float(m.square().sum()) for m in self._moments(name).mean)
        ratio = signal / noise if noise > 0 else (math.inf if signal > 0 else math.nan)
        return {"vector": ratio, "signal": signal, "noise": noise}

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the summary of every component.

        Returns:
            Per component: `vector` and `mean` as in the methods of that name, `signal` = ||E g||^2, `noise` =
            E||g - E g||^2 and `count`.

        Raises:
            RuntimeError: If nothing was recorded or a component has fewer than two samples.
        """
        if not self.names:
            raise RuntimeError("the GSNR needs at least 2 samples, got none: call update() first")
        return {
            name: {**self._summary(name), "mean": self.mean(name), "count": self.count(name)} for name in self.names
        }

    def reset(self) -> None:
        """Forget all samples, component names and shapes."""
        self._running.clear()
        self._completed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the settings and statistics, in plain containers of tensors and numbers."""
        return {
            "settings": self._settings(),
            "running": {name: asdict(moments) for name, moments in self._running.items()},
            "completed": {name: asdict(moments) for name, moments in self._completed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all statistics by a copy of those of `state_dict`; going on is exact.

        Raises:
            ValueError: If the state was recorded with other settings.
        """
        if state["settings"] != self._settings():
            raise ValueError(
                f"the state was recorded with {state['settings']}, this estimator has {self._settings()}; "
                "build it with the same settings"
            )
        self._running = {name: _Moments(**copy.deepcopy(m)) for name, m in state["running"].items()}
        self._completed = {name: _Moments(**copy.deepcopy(m)) for name, m in state["completed"].items()}

    def _settings(self) -> dict[str, Any]:
        return {"window": self.window, "decay": self.decay, "unbiased": self.unbiased}
