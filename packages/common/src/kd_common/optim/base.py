"""Base of the component optimizers: buckets, checks of gradients, groups, buffers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from kd_common.checks import at_least, within
from kd_common.errors import UserError
from kd_common.grads import Gradients, sum_gradients


def bucket_components(coefficients: Mapping[str, float], apart: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return the components grouped by equal coefficient.

    Args:
        coefficients: Momentum or beta1 per component.
        apart: Components that keep a bucket of their own.

    Returns:
        Component names per bucket, in the order of `coefficients`; the bucket is named by joining them with "+".
    """
    groups: dict[tuple[float, str | None], list[str]] = {}
    for name, value in coefficients.items():
        groups.setdefault((value, name if name in apart else None), []).append(name)
    return {"+".join(names): tuple(names) for names in groups.values()}


class ComponentOptimizer(Optimizer):
    """Optimizer whose first moment has one coefficient per named gradient component.

    `step` takes the gradients as an argument instead of reading `param.grad`. Components with the same coefficient
    share one buffer, a bucket. This is exact, since the first moment is linear in the gradient. A caller may sum the
    gradients of a bucket at the network's outputs (`kd_common.grads.merge`). It then pays one backward pass per
    distinct coefficient, not per component. Memory: one buffer per bucket.

    Subclasses set `coefficient` and `shared` and implement `_update`.

    Args:
        params: Parameters or parameter groups; a group may bring its own lr and weight_decay.
        defaults: Settings of the groups, among them `coefficient`.

    Raises:
        ValueError: If a coefficient is outside [0, 1), a component name contains "+", lr or weight_decay is negative,
            or a group brings a shared setting.
    """

    coefficient: ClassVar[str]
    """Group key of the coefficients per component."""
    shared: ClassVar[tuple[str, ...]]
    """Group keys that are equal in all groups; they are read from the first group, so that a loaded state decides."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        coefficients = defaults[self.coefficient]
        if not coefficients:
            raise UserError(f"{self.coefficient} is empty: name at least one component")
        for name, value in coefficients.items():
            within(f"{self.coefficient}['{name}']", value, "[0, 1)")
            if "+" in name:
                raise UserError(f"component name '{name}' must not contain '+', which joins the names of a bucket")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own lr or weight_decay; see `torch.optim.Optimizer.add_param_group`."""
        if misplaced := [key for key in self.shared if key in param_group]:
            raise UserError(f"a parameter group brings {misplaced}, which all groups share: pass it to the optimizer")
        super().add_param_group(param_group)
        for key in ("lr", "weight_decay"):
            at_least(key, self.param_groups[-1][key], 0)

    @property
    def buckets(self) -> dict[str, tuple[str, ...]]:
        """Component names per bucket; each bucket has one buffer and needs one backward pass."""
        return bucket_components(self.param_groups[0][self.coefficient])

    @property
    def gradient_components(self) -> frozenset[str]:
        """Components for which `step` requires a gradient."""
        return frozenset(self.param_groups[0][self.coefficient])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, components: Mapping[str, Gradients]
    ) -> Any:
        """Update the parameters from one gradient list per component.

        Args:
            closure: Called once, with gradients enabled, before the update, as in `torch.optim.SGD`.
            components: Gradients per component or per bucket, aligned with the parameters of all groups in order.
                Together they must cover every component once; several members of a bucket are summed. None means
                that the component does not touch the parameter: it adds nothing to the update and its buffer
                stays. A parameter with None throughout is skipped, weight decay included.

        Returns:
            The value of the closure, or None.

        Raises:
            ValueError: If a name is unknown, missing or repeated, or a list or tensor has the wrong size; before
                anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        gradients = self._bucket_gradients(components, params)
        touched = [any(grads[i] is not None for grads in gradients.values()) for i in range(len(params))]
        start = 0
        for group in self.param_groups:
            stop = start + len(group["params"])
            places = [i for i in range(start, stop) if touched[i]]
            if places:
                selected = {bucket: [grads[i] for i in places] for bucket, grads in gradients.items()}
                self._update(group, [params[i] for i in places], selected)
            start = stop
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: dict[str, list[Tensor | None]]) -> None:
        """Update the parameters of one group; each has a gradient in at least one bucket, and all buckets are given."""
        raise NotImplementedError

    def _bucket_gradients(
        self, components: Mapping[str, Gradients], params: Sequence[Tensor]
    ) -> dict[str, list[Tensor | None]]:
        """Return the checked gradients, summed per bucket."""
        buckets, required = self.buckets, self.gradient_components
        known = required | {bucket for bucket, members in buckets.items() if required & set(members)}
        if unknown := sorted(components.keys() - known):
            raise ValueError(f"unknown components {unknown}: expected {sorted(required)} or buckets of {list(buckets)}")
        covered = [member for name in components for member in buckets.get(name, (name,))]
        if missing := sorted(required.difference(covered)):
            raise ValueError(
                f"components {missing} have no gradient: got {sorted(components)}, buckets {list(buckets)}"
            )
        if repeated := sorted({name for name in covered if covered.count(name) > 1}):
            raise ValueError(
                f"components {repeated} are given twice, alone and within a bucket: got {sorted(components)}"
            )
        kept = {key.partition(".")[2] for param in params for key in self.state.get(param, ())}
        if strays := sorted(kept - {""} - buckets.keys()):
            raise ValueError(
                f"{self.coefficient} was changed so that the buckets are {list(buckets)}, but there are buffers of "
                f"{strays}: change it only such that the same components stay equal"
            )
        for name, grads in components.items():
            if len(grads) != len(params):
                raise ValueError(f"'{name}' has {len(grads)} gradients, expected one per parameter: {len(params)}")
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad is not None and grad.shape != param.shape:
                    raise ValueError(
                        f"'{name}': gradient {i} has shape {tuple(grad.shape)}, expected {tuple(param.shape)}"
                    )
        nothing: Gradients = [None] * len(params)
        return {
            bucket: sum_gradients(
                [components[n] for n in dict.fromkeys((bucket, *members)) if n in components] or [nothing]
            )
            for bucket, members in buckets.items()
        }

    def _buffers(self, params: Sequence[Tensor], key: str) -> list[Tensor]:
        """Return the moment buffers of the parameters, zero at the first use.

        The key of a bucket's buffers is `"<kind>.<bucket>"`.
        """
        for param in params:
            if key not in self.state[param]:
                self.state[param][key] = torch.zeros_like(param)
        return [self.state[param][key] for param in params]
