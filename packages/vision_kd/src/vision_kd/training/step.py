"""From logits to component gradients: the part of a training step that needs neither trainer nor optimizer state.

The components are differentiated at the logits first, where each is a cheap (N, C) tensor. Components that share a
momentum are summed there, and only then does each remaining entry travel back through the network:

    images -> student -> logits -> method -> {task, target, nontarget} -> d/dlogits -> merge -> one backward per bucket
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_common.functional.logits import at_least_fp32
from kd_common.grads import component_gradients, merge, output_gradients
from vision_kd.methods import Method

ComponentGradients = dict[str, list[Tensor | None]]


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch yields.

    Attributes:
        components: Mean of every loss component over the batch, detached scalars.
        gradients: One list of parameter gradients per bucket, or per component when they were kept apart.
        outputs: The student's outputs that were differentiated, detached: a classifier's logits of each view.
    """

    components: dict[str, Tensor]
    gradients: ComponentGradients
    outputs: dict[str, Tensor]


def component_step(
    outputs: Mapping[str, Tensor],
    losses: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    params: Sequence[nn.Parameter],
    *,
    buckets: Mapping[str, tuple[str, ...]] | None = None,
) -> StepOutput:
    """Differentiate every component at the network's outputs, and carry each remaining entry through the network.

    Args:
        outputs: Outputs of the student, attached to its graph.
        losses: Components, each of shape (N,) or (), of detached outputs in at least fp32; called outside autocast.
        params: Parameters to differentiate, in the optimizer's order.
        buckets: Components to merge before the backward passes (`optimizer.buckets`); None keeps every component
            apart, which costs one backward pass each and allows measuring them.
    """
    # The cast is inside the graph: gradients of bf16 outputs arrive in fp32 and autograd casts once, at the last layer.
    wide = {name: at_least_fp32(output) for name, output in outputs.items()}
    leaves = {name: output.detach().requires_grad_() for name, output in wide.items()}
    with torch.autocast(device_type=next(iter(leaves.values())).device.type, enabled=False):
        parts = losses(leaves)
        gradients = output_gradients(parts, list(leaves.values()))
    if buckets is not None:
        gradients = merge(gradients, buckets)
    return StepOutput(
        components={name: part.detach().mean() for name, part in parts.items()},
        gradients=component_gradients(list(wide.values()), gradients, params),
        outputs={name: leaf.detach() for name, leaf in leaves.items()},
    )


def teacher_logits(teacher: nn.Module | None, views: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Teacher logits of the named views in at least fp32, without gradient; empty when there is no teacher."""
    if teacher is None:
        return {}
    with torch.no_grad():
        return {name: at_least_fp32(teacher(views[name])) for name in names}


def distillation_step(
    student: nn.Module,
    teacher: nn.Module | None,
    method: Method,
    views: Mapping[str, Tensor],
    target: Tensor,
    params: Sequence[nn.Parameter],
    *,
    buckets: Mapping[str, tuple[str, ...]] | None = None,
    epoch: float = 0.0,
    k: int | None = None,
) -> StepOutput:
    """Run student and teacher on one micro-batch and differentiate every component.

    Args:
        student: Network to train, images in [0, 1] to logits.
        teacher: Frozen network of the same kind, or None for methods without one.
        method: Loss.
        views: Images of shape (N, C, H, W) for every view the method declares.
        target: Class indices, shape (N,).
        params: Parameters to differentiate, in the optimizer's order.
        buckets: As in `component_step`.
        epoch: Progress in epochs, for losses that warm up.
        k: Surviving classes of the dynamic top-k mask.
    """
    # The teacher goes first: the student's activations are then still in the cache when the backward passes start.
    soft_labels = teacher_logits(teacher, views, method.views)
    logits = {name: student(views[name]) for name in method.views}
    return component_step(
        logits,
        lambda leaves: method(leaves, soft_labels, target, epoch=epoch, k=k),
        params,
        buckets=buckets,
    )
