"""Gradients of several loss components at the network's outputs, through the network and over the ranks.

The usual order of one step, with an optimizer of `kd_common.optim`::

    leaves = [logits.detach().requires_grad_()]
    at_outputs = output_gradients(losses(leaves), leaves)            # cheap: no pass through the network
    at_outputs = merge(at_outputs, optimizer.buckets)                # components that share a momentum become one
    components = component_gradients([logits], at_outputs, params)   # one backward pass per bucket
    components = all_reduce_mean(components)                         # one collective under DDP
    optimizer.step(components=components)

Cost: one forward pass and as many backward passes through the network as there are distinct momenta.
"""

import itertools
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from kd_common.distributed import flat_all_reduce_mean, is_dtensor

Gradients = Sequence[Tensor | None]
"""One gradient per output or parameter; None where the component does not reach it."""


def sum_gradients(gradients: Sequence[Gradients]) -> list[Tensor | None]:
    """Return the sum of aligned gradient lists, in which None counts as zero.

    Args:
        gradients: At least one list; all of the same length, with the same shapes at the same place.

    Returns:
        The sums; None where every list has None. With a single list its own tensors, not copies.
    """
    total = list(gradients[0])
    for other in gradients[1:]:
        pairs = [
            (i, t, o) for i, (t, o) in enumerate(zip(total, other, strict=True)) if t is not None and o is not None
        ]
        total = [o if t is None else t for t, o in zip(total, other, strict=True)]
        if pairs:
            places, left, right = zip(*pairs, strict=True)
            for i, value in zip(places, torch._foreach_add(left, right), strict=True):
                total[i] = value
    return total


def output_gradients(
    components: Mapping[str, Tensor], outputs: Sequence[Tensor]
) -> dict[str, tuple[Tensor | None, ...]]:
    """Return the gradient of every component's mean over the rows with respect to the network's outputs.

    Args:
        components: Loss per component, per sample with shape (N,) or already reduced with shape ().
        outputs: Detached outputs that require a gradient and from which the losses were computed; no pass through the
            network takes place.

    Returns:
        One gradient per output and component, in the shape of the output; None where the loss does not use it.

    Raises:
        ValueError: If a component has more than one axis or carries no gradient.
    """
    for name, value in components.items():
        if value.ndim > 1:
            raise ValueError(f"component '{name}' must have shape (N,) or (), got {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError(
                f"component '{name}' carries no gradient: compute it from the outputs passed here, with gradients on"
            )
    names = list(components)
    return {
        name: torch.autograd.grad(value.mean(), outputs, retain_graph=name != names[-1], allow_unused=True)
        for name, value in components.items()
    }


def merge(
    output_grads: Mapping[str, Gradients], buckets: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Tensor | None, ...]]:
    """Return the sum of the gradients of each bucket, which saves one backward pass per merged component.

    This is exact for components that share a momentum, because the momentum recursion is linear in the gradient.

    Args:
        output_grads: Gradients per component, aligned lists.
        buckets: Component names per bucket, as in `optimizer.buckets`. Members without a gradient, such as a
            component made of the weight decay alone, add nothing; a bucket of such members only is left out.

    Returns:
        Gradients per bucket.

    Raises:
        ValueError: If a component belongs to no bucket.
    """
    if homeless := output_grads.keys() - {name for members in buckets.values() for name in members}:
        raise ValueError(f"components {sorted(homeless)} belong to no bucket of {list(buckets)}: give them a momentum")
    present = {bucket: [output_grads[n] for n in names if n in output_grads] for bucket, names in buckets.items()}
    return {bucket: tuple(sum_gradients(gradients)) for bucket, gradients in present.items() if gradients}


def component_gradients(
    outputs: Sequence[Tensor], output_grads: Mapping[str, Gradients], params: Iterable[Tensor]
) -> dict[str, list[Tensor | None]]:
    """Return the gradient of every component with respect to the parameters.

    This costs one backward pass per entry that has a gradient, so merge entries that share a momentum first. It frees
    the graph.

    Plain parameters: `.grad` is neither read nor written. The gradients belong to this rank, so follow with
    `all_reduce_mean`. The forward pass must not have armed DDP's own reduction. Lightning's manual optimisation does
    not arm it; with a bare `DistributedDataParallel` run the forward pass inside `no_sync()`.

    FSDP2 parameters: `torch.autograd.grad` cannot reach them. Every pass runs `torch.autograd.backward` and takes
    `.grad` away. The gradients are DTensors, already averaged over the ranks.

    Args:
        outputs: Outputs of the network, attached to its graph.
        output_grads: Per component one gradient per output, in the shape of the output, or None.
        params: Parameters. Under FSDP2 pass all parameters of the optimizer: every pass fills them all, and the module
            lists gathered parameters between forward and backward.

    Returns:
        Gradients per component, aligned with `params`; None for frozen parameters and for those the component
        does not reach.

    Raises:
        ValueError: If some parameters are sharded by FSDP2 and others are not.
        RuntimeError: If parameters are sharded by FSDP2 and some `.grad` is set already, which would be lost.
    """
    params = list(params)
    sharded = [is_dtensor(param) for param in params]
    if any(sharded) and not all(sharded):
        raise ValueError(
            "params mixes sharded and plain parameters: pass those of the optimizer, as after a forward pass the root "
            "module of FSDP2 lists its gathered parameters instead"
        )
    vjp = _harvest if any(sharded) else _grad
    reached = {
        name: [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        for name, grads in output_grads.items()
    }
    names = [name for name, pairs in reached.items() if pairs]
    return {
        name: vjp(pairs, params, retain_graph=name != names[-1]) if pairs else [None] * len(params)
        for name, pairs in reached.items()
    }


def _grad(pairs: Sequence[tuple[Tensor, Tensor]], params: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    outputs, grads = zip(*pairs, strict=True)
    trainable = [param for param in params if param.requires_grad]
    found = iter(torch.autograd.grad(outputs, trainable, grads, retain_graph=retain_graph, allow_unused=True))
    return [next(found) if param.requires_grad else None for param in params]


def _harvest(
    pairs: Sequence[tuple[Tensor, Tensor]], params: Sequence[Tensor], retain_graph: bool
) -> list[Tensor | None]:
    if any(param.grad is not None for param in params):
        raise RuntimeError("a parameter has .grad set, which would be lost: call zero_grad(set_to_none=True) first")
    outputs, grads = zip(*pairs, strict=True)
    torch.autograd.backward(outputs, grads, retain_graph=retain_graph)
    found = [param.grad for param in params]
    for param in params:
        param.grad = None
    return found


def all_reduce_mean(components: Mapping[str, Gradients]) -> dict[str, list[Tensor | None]]:
    """Return the mean of every gradient over the ranks, with one all-reduce for all components together.

    With losses averaged over equally many rows per rank this is the gradient of the mean over the whole batch.

    Args:
        components: Gradients per component. Names, order and the places of None must agree over the ranks; they
            do when all ranks run the same graph.

    Returns:
        Averaged gradients in the same structure. FSDP2 gradients (DTensors) are averaged already and pass through,
        as does everything in a single process.
    """
    local = [g for grads in components.values() for g in grads if g is not None and not is_dtensor(g)]
    means = iter(flat_all_reduce_mean(local))
    return {
        name: [g if g is None or is_dtensor(g) else next(means) for g in grads] for name, grads in components.items()
    }


@torch.no_grad()
def accumulate(
    into: MutableMapping[str, list[Tensor | None]], components: Mapping[str, Gradients], scale: float
) -> None:
    """Add scaled gradients to running sums in place: `into += scale * components`.

    Args:
        into: Running sums per component; an empty dictionary before the first micro-batch.
        components: Gradients of one micro-batch; they are not kept.
        scale: Factor, 1 / number of micro-batches for the mean.
    """
    for name, grads in components.items():
        sums = into.setdefault(name, [None] * len(grads))
        pairs = [(s, g) for s, g in zip(sums, grads, strict=True) if s is not None and g is not None]
        if pairs:
            torch._foreach_add_(*zip(*pairs, strict=True), alpha=scale)
        into[name] = [g * scale if s is None and g is not None else s for s, g in zip(sums, grads, strict=True)]


@torch.no_grad()
def clip_components(components: Mapping[str, Gradients], max_norm: float) -> Tensor:
    """Return the L2 norm of the summed gradient; scales all components in place so that it is at most `max_norm`.

    One common factor keeps the components' proportions. It clips the sum as `torch.nn.utils.clip_grad_norm_` clips the
    gradient of a plain loss, with the same 1e-6 in the denominator.

    Args:
        components: Gradients per component, changed in place.
        max_norm: > 0.

    Returns:
        The norm before clipping, shape (); not read on the host.

    Raises:
        ValueError: If `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    norm = _norm(sum_gradients(list(components.values())))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if grads := [g for component in components.values() for g in component if g is not None]:
        torch._foreach_mul_(grads, factor)
    return norm


@torch.no_grad()
def component_norms(components: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """Return the L2 norm of every component over all parameters, shape () each; not read on the host."""
    return {name: _norm(grads) for name, grads in components.items()}


@torch.no_grad()
def component_cosines(components: Mapping[str, Gradients]) -> dict[tuple[str, str], Tensor]:
    """Return the cosine of the angle between every two components over all parameters, shape () each, on their device.

    None counts as zero. A component that is zero everywhere has cosine 0 with all others.
    """
    norms = component_norms(components)
    cosines = {}
    for a, b in itertools.combinations(sorted(components), 2):
        pairs = zip(components[a], components[b], strict=True)
        products = [(x * y).sum() for x, y in pairs if x is not None and y is not None]
        dot = _replicated(torch.stack(products).sum()) if products else torch.zeros_like(norms[a])
        cosines[a, b] = dot / (norms[a] * norms[b]).clamp_min(torch.finfo(dot.dtype).tiny)
    return cosines


def _norm(gradients: Gradients) -> Tensor:
    return _replicated(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))


def _replicated(scalar: Tensor) -> Tensor:
    """Return a scalar as a plain tensor, summed over the ranks if it was a DTensor."""
    return scalar.full_tensor() if is_dtensor(scalar) else scalar  # type: ignore[attr-defined]
