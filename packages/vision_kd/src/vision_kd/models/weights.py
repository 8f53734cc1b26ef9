"""Loading of a weight file into a network: all tensors, or an error that lists the misfits."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vision_kd.models.checkpoints import Checkpoint, CheckpointError

logger = logging.getLogger(__name__)

INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that torch.compile, FSDP and activation checkpointing put into names, at the front or in the middle."""

BESIDE = ("student.", "teacher.", "ema.", "auxiliary.")
"""Modules of a training checkpoint next to the network."""

AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)", re.IGNORECASE)
"""Pattern of the name of a moving average, such as state_dict_ema."""

ROOTS_TRIED = 4

State = Mapping[str, Tensor]


class Found(NamedTuple):
    """Tensors of a file that may belong to the network.

    Attributes:
        entry: The state dict that they are of, such as "state_dict"; "" for the file itself.
        root: Prefix of the network's names there, such as "module.model.".
        state: The tensors by the network's names.
        others: Names of the entry's other tensors.
    """

    entry: str
    root: str
    state: State
    others: list[str]

    @property
    def name(self) -> str:
        """Entry and root as one name."""
        return ".".join(filter(None, (self.entry, self.root.strip("."))))


def load_weights(
    network: nn.Module,
    checkpoint: Checkpoint,
    *,
    model: str,
    num_classes: int | None = None,
    entry: str | None = None,
    surplus: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy a checkpoint's tensors into a network; names and shapes must agree exactly.

    The network may have any prefix that all of its tensors share, such as `module.` or `model.`. Wrappers of
    torch.compile and FSDP may occur anywhere in a name. Of several state dicts the fitting one is taken. A moving
    average is preferred to the weights that it averages, and a message reports it; `entry` chooses otherwise.

    Files from before batch norm counted its batches lack `num_batches_tracked`; they load with zero counts.

    Args:
        network: The network, changed in place.
        checkpoint: Content returned by `read_checkpoint`.
        model: The network's name, for the message.
        num_classes: Classes of the data, for the message; None for a network without classes.
        entry: Name of the entry or prefix to read, for a file that holds several networks.
        surplus: Whether a tensor of this name may be left over.

    Raises:
        CheckpointError: If nothing in the file fits, several things fit, or tensors are left over or cannot be used;
            the message gives the file and lists them.
    """
    expected = network.state_dict()
    candidates = _candidates(checkpoint, expected)
    if entry is not None:
        candidates = [found for found in candidates if f".{entry.strip('.')}." in f".{found.name}."]
        if not candidates:
            names = ", ".join(name or "the file itself" for name in checkpoint.states)
            raise CheckpointError(f"{checkpoint.path} has no entry {entry!r}; it holds {names}")
    fitting = [found for found in candidates if not any(_differences(found.state, expected, surplus))]
    if not fitting:
        best = min(candidates, key=lambda found: sum(map(len, _differences(found.state, expected, surplus))))
        raise CheckpointError(_misfit(best, expected, checkpoint.path, model, num_classes, surplus))
    found = _one_of(fitting, checkpoint.path)
    if entry is None and (left := _left_over(found, fitting, surplus)):
        raise CheckpointError(
            f"{checkpoint.path} holds {model!r} behind the prefix {found.root!r} and tensors beside it that nothing "
            f"reads: {_first(left)}. Set entry to {found.name!r} to leave them, or save the network's state dict alone"
        )
    if bad := _unusable(found.state, expected):
        raise CheckpointError(f"{checkpoint.path} has tensors that {model!r} cannot use: {_first(bad)}")
    network.load_state_dict({key: found.state[key] for key in expected if key in found.state}, strict=False)


def rows(checkpoint: Checkpoint, key: str) -> int | None:
    """Return the length of the tensor of this name, behind whatever prefix; None without one."""
    tensors = (state[name] for state in checkpoint.states.values() for name in state if f".{name}".endswith(f".{key}"))
    return next((len(tensor) for tensor in tensors if tensor.ndim), None)


def _candidates(checkpoint: Checkpoint, expected: State) -> list[Found]:
    """Return every candidate for the network: a state dict under each prefix that most of its names share."""
    found = []
    for entry, raw in checkpoint.states.items():
        state = _unwrapped(raw)
        roots: Counter[str] = Counter()
        for name in state:
            starts = (0, *(place.end() for place in re.finditer(r"\.", name)))
            roots.update(name[:start] for start in starts if name[start:] in expected)
        for root in dict.fromkeys(["", *(root for root, _ in roots.most_common(ROOTS_TRIED))]):
            inside = {name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}
            found.append(Found(entry, root, inside, [name for name in state if not name.startswith(root)]))
    return found


def _unwrapped(state: State) -> State:
    """Return the tensors under names without the wrappers that may stand anywhere in them."""
    pattern = "|".join(rf"(?<![^.]){re.escape(wrapper)}" for wrapper in INNER_WRAPPERS)
    bare = {re.sub(pattern, "", name): tensor for name, tensor in state.items()}
    return bare if len(bare) == len(state) else state


def _differences(state: State, expected: State, surplus: Callable[[str], bool]) -> tuple[list[str], ...]:
    """Return the names that are missing, left over, and of another shape."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected and not key.endswith("n_averaged") and not surplus(key)]
    reshaped = [
        f"{key} (file {_shape(state[key])}, model {tuple(expected[key].shape)})"
        for key in expected
        if key in state and _shape(state[key]) != tuple(expected[key].shape)
    ]
    return missing, unexpected, reshaped


def _shape(tensor: Tensor) -> tuple[int, ...] | str:
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def _one_of(fitting: list[Found], path: Path) -> Found:
    """Return the network to take: the only one, one of equals, or a moving average, which is then said."""
    distinct: list[Found] = []
    for found in fitting:
        if not any(_equal(found.state, other.state) for other in distinct):
            distinct.append(found)
    if len(distinct) == 1:
        return distinct[0]
    names = ", ".join(repr(found.name) for found in distinct)
    averages = [found for found in distinct if AVERAGE.search(found.name)]
    if len(averages) != 1:
        raise CheckpointError(f"{path} holds several networks that fit: {names}. Set entry to the one to read")
    logger.warning(
        "%s holds several networks that fit: %s. The moving average %r is read; set entry to read another",
        path,
        names,
        averages[0].name,
    )
    return averages[0]


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[key].dtype and not a.is_nested and a.layout == other[key].layout and torch.equal(a, other[key])
        for key, a in one.items()
    )


def _left_over(found: Found, fitting: list[Found], surplus: Callable[[str], bool]) -> list[str]:
    """Return the names next to the network's that no other fitting network and no known module explains."""
    own = found.root.removeprefix("module.")
    others = [other.root for other in fitting if other.entry == found.entry and other.root not in ("", found.root)]
    explained = (*(start for start in BESIDE if not own.startswith(start)), *others)
    return [
        name
        for name in found.others
        if not name.startswith(explained)
        and not name.removeprefix("module.").startswith(explained)
        and not name.endswith("n_averaged")
        and not surplus(name)
    ]


def _unusable(state: State, expected: State) -> list[str]:
    """Return names and reasons of tensors that cannot be copied without a loss."""
    reasons = {key: _reason(state[key], expected[key]) for key in expected if key in state}
    return [f"{key} ({reason})" for key, reason in reasons.items() if reason]


def _reason(tensor: Tensor, expected: Tensor) -> str:
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout if tensor.layout != torch.strided else tensor.dtype}, no plain values"
    kinds = [(t.is_complex(), t.is_floating_point()) for t in (tensor, expected)]
    counter = kinds == [(False, True), (False, False)] and torch.equal(tensor, tensor.round())  # averaged with the rest
    if kinds[0] != kinds[1] and not counter:
        return f"{tensor.dtype} for {expected.dtype}"
    if expected.is_floating_point() and expected.isfinite().all():
        wrong = int((~tensor.to(expected.dtype).isfinite()).sum())
        return f"{wrong} of {tensor.numel()} values are not finite" if wrong else ""
    return ""


def _misfit(
    best: Found,
    expected: State,
    path: Path,
    model: str,
    num_classes: int | None,
    surplus: Callable[[str], bool],
) -> str:
    """Describe the content of a file that does not fit."""
    missing, unexpected, reshaped = _differences(best.state, expected, surplus)
    where = f"under {best.name!r} " if best.name else ""
    differences = (
        f"{where}missing in the file: {_first(missing)}; not in the model: {_first(unexpected)}; "
        f"other shapes: {_first(reshaped)}"
    )
    if not reshaped and [t.shape for t in best.state.values()] == [t.shape for t in expected.values()]:
        differences += (
            ". All tensors have the model's shapes in the model's order: it may be that network as another library "
            "names its parts. If it is, rename them as docs/vision_methods.md shows under 'Weights of other libraries'"
        )
    if num_classes is None:
        return f"{path} does not fit {model}: {differences}. Give weights of that model."
    weights = (key for key in reversed(list(expected)) if expected[key].ndim > 1 and len(expected[key]) == num_classes)
    head = next(weights, "")
    stem = head.removesuffix("weight")
    if missing and head and all(key.startswith(stem) for key in missing) and not unexpected and not reshaped:
        return (
            f"{path} holds {model!r} without its head ({', '.join(missing)}), so that its {num_classes} classes would "
            "be drawn at random: take weights with a head, trained on these classes"
        )
    classes = len(best.state[head]) if head in best.state else "an unknown number of"
    return (
        f"{path} has {classes} classes and does not fit {model!r} with {num_classes} classes: "
        f"{differences}. Give the model and the class count that the file was trained with."
    )


def _first(items: list[str]) -> str:
    """Return the first three items and how many there are, or "none"."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more if items else "none"
