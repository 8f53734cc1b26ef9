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
    """Mean and biased variance of a stream of gradient lists."""

    mean: list[Tensor]
    variance: list[Tensor]
    count: int = 0

    @classmethod
    def zeros_like(cls, tensors: Sequence[Tensor]) -> "_Moments":
        def zeros() -> list[Tensor]:
            return [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]

        return cls(mean=zeros(), variance=zeros())

    def add(self, gradients: list[Tensor]) -> None:
        self.count += 1
        share = 1 / self.count
        deviation = torch._foreach_sub(gradients, self.mean)
        torch._foreach_add_(self.mean, deviation, alpha=share)
        torch._foreach_addcmul_(self.variance, deviation, deviation, value=share)
        torch._foreach_mul_(self.variance, 1 - share)


class GradientSNR:
    """Streaming estimator of the GSNR ||E g||^2 / E||g - E g||^2 of named gradient components.

    Mean and variance are taken over the samples (mini-batches) since the last reset. Memory is constant: two buffers
    per component, in at least float32. The variance is unbiased. The squared mean is the plug-in estimate: pure noise
    has an expected GSNR of 1 / n after n samples, not 0.

    Example:
        >>> snr = GradientSNR()
        >>> for gradient in ([1.0, 2.0], [3.0, 2.0]):
        ...     snr.update({"task": torch.tensor(gradient)})
        >>> snr.vector("task")
        4.0

    References:
        DeepKD, arXiv 2505.15133; GSNR: arXiv 2001.07384.
    """

    def __init__(self) -> None:
        self._moments: dict[str, _Moments] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Gradients]) -> None:
        """Add one sample to each component given; the gradients are read, never kept.

        Args:
            gradients: A gradient or a sequence of gradients per component, with the same shapes in every call. None
                counts as zeros, from the component's second sample on.

        Raises:
            ValueError: If a component is empty, its shapes change, or its first sample contains None.
        """
        for name, value in gradients.items():
            self._add(name, [value] if isinstance(value, Tensor) else list(value))

    def _add(self, name: str, sample: list[Tensor | None]) -> None:
        known = self._moments.get(name)
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
        moments = self._moments.setdefault(name, known or _Moments.zeros_like(tensors))
        # Loaded statistics are on the checkpoint's device; the gradients show the right one.
        moments.mean = [m.to(g.device) for m, g in zip(moments.mean, tensors, strict=True)]
        moments.variance = [v.to(g.device) for v, g in zip(moments.variance, tensors, strict=True)]
        moments.add(tensors)

    @property
    def names(self) -> list[str]:
        """Return the names of the components recorded since the last reset."""
        return list(self._moments)

    def count(self, name: str) -> int:
        """Return the number of samples of a component; 0 for a component never recorded."""
        return self._moments[name].count if name in self._moments else 0

    def vector(self, name: str) -> float:
        """Return the GSNR of a component; inf without noise, NaN if the mean is zero too.

        Raises:
            KeyError: If the component was never recorded.
            RuntimeError: If it has fewer than two samples.
        """
        if name not in self._moments:
            raise KeyError(f"no gradient of component {name!r} was recorded; recorded: {self.names}")
        moments = self._moments[name]
        if moments.count < 2:
            raise RuntimeError(f"the GSNR of component {name!r} needs at least 2 samples, got {moments.count}")
        noise = sum(float(v.sum()) for v in torch._foreach_div(moments.variance, 1 - 1 / moments.count))
        signal = sum(float(m.square().sum()) for m in moments.mean)
        return signal / noise if noise > 0 else (math.inf if signal > 0 else math.nan)

    def reset(self) -> None:
        """Forget all samples, component names and shapes."""
        self._moments.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the statistics, in plain containers of tensors and numbers."""
        return {name: asdict(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all statistics by a copy of those of `state_dict`; continuing from them is exact."""
        self._moments = {name: _Moments(**copy.deepcopy(moments)) for name, moments in state.items()}
