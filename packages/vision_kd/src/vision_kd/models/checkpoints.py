"""Reading weight files safely and loading them into a network, with errors that name both sides."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_common.files import damaged_entry

STUDENT_FORMAT = "vision_kd.student/1"
"""Marks the "meta" entry of the files that `save_student` writes."""

WRAPPERS = ("module.", "_orig_mod.", "student.", "network.")
"""Prefixes that DDP, torch.compile and this project's modules put before the keys of a network."""

EMA = "ema.module."
"""Prefix of the student's moving average in a training checkpoint."""


class CheckpointError(ValueError):
    """A weight file that cannot be read or does not fit the model."""


class Checkpoint(NamedTuple):
    """A weight file: its path, its tensors by name, and the description that `save_student` wrote, if any."""

    path: Path
    state: dict[str, Tensor]
    meta: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in a file without running code from it.

    Accepted layouts: `{"model": state_dict}` (the public CIFAR-100 teacher bundle, and `save_student`),
    `{"state_dict": state_dict}`, and a plain state dict. Files ending in ".safetensors" are read as such, all
    others as `torch.save` files.

    Args:
        path: the file.

    Returns:
        The tensors, on the CPU, under keys stripped of every wrapper prefix that all of them share.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds more than tensors and plain values, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} is not a file (looked in {path.absolute().parent})")
    content = _read(path)
    fields = content if isinstance(content, Mapping) else {}
    layouts = (fields.get("model"), fields.get("state_dict"), fields)
    state = next((layout for layout in layouts if _is_state_dict(layout)), None)
    if state is None:
        raise CheckpointError(
            f"{path} holds no state dict: expected {{'model': ...}}, {{'state_dict': ...}} or tensors by name, "
            f"found {type(content).__name__} with {', '.join(map(repr, list(fields)[:5])) or 'no entries'}"
        )
    meta = fields.get("meta")
    return Checkpoint(path, _strip_wrappers(_inference_network(state)), meta if isinstance(meta, dict) else {})


def load_weights(
    network: nn.Module,
    checkpoint: Checkpoint,
    *,
    model: str,
    num_classes: int | None = None,
    head: str | None = None,
) -> None:
    """Copy a checkpoint's tensors into a network; names and shapes must agree exactly.

    Files from before batch norm counted its batches lack `num_batches_tracked`; they load with zero counts.

    Args:
        network: the network, changed in place.
        checkpoint: what `read_checkpoint` returned.
        model: the network's name, for the message.
        num_classes: classes of the data, for the message; None for a network without classes.
        head: key of the weight with a row per class; None for the last matrix.

    Raises:
        CheckpointError: keys or shapes differ; the message gives file, model, classes and the first differences.
    """
    expected, found = network.state_dict(), checkpoint.state
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} (file {tuple(found[key].shape)}, model {tuple(expected[key].shape)})"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if missing or unexpected or reshaped:
        differences = (
            f"missing in the file: {_first(missing)}; not in the model: {_first(unexpected)}; "
            f"other shapes: {_first(reshaped)}"
        )
        if num_classes is None:
            raise CheckpointError(f"{checkpoint.path} does not fit {model}: {differences}. Give weights of that model.")
        head = head or next((key for key in reversed(expected) if expected[key].ndim == 2), "")
        classes = len(found[head]) if head in found else "an unknown number of"
        raise CheckpointError(
            f"{checkpoint.path} has {classes} classes and does not fit {model!r} with {num_classes} classes: "
            f"{differences}. Give the model and the class count that the file was trained with."
        )
    network.load_state_dict(found)


def _read(path: Path) -> Any:
    """Content of a weight file; only tensors, plain containers and `argparse.Namespace` are unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (damaged := damaged_entry(path)):
            raise CheckpointError(f"{path} cannot be read: damaged ({damaged}). Fetch or write it again")
        # The reference training scripts of the CIFAR bundle store their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds Python objects other than tensors and plain values, "
            "which could run code. Save `model.state_dict()` alone."
        ) from error
    # On damaged bytes torch.load raises almost any kind of error: KeyError, IndexError, struct.error, ...
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read: damaged or not a weight file ({cause})") from error


def _is_state_dict(value: Any) -> bool:
    """Whether a value maps names to tensors, at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _inference_network(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The student of a training checkpoint, its moving average where there is one; else all entries.

    Beside the student such a file may hold the fusion that was trained with it, which nothing else needs.
    """
    for prefix in (EMA, "student."):
        if student := {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}:
            return student
    return state


def _strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrapper prefixes, one by one, as long as every key carries them."""
    keys = list(state)
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in keys)), ""):
        keys = [key.removeprefix(prefix) for key in keys]
    return dict(zip(keys, state.values(), strict=True))


def _first(items: list[str]) -> str:
    """The first three items and how many there are, or "none"."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more if items else "none"
