"""Safe reading of weight files: every state dict in them, and the reports about them."""

import argparse
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_common.errors import UserError
from kd_common.files import damaged_entry

DEPTH = 3
"""Depth of nesting to which a file is searched for state dicts, as for `callbacks.EMA.state_dict`."""

DESCRIPTION = "meta"
"""Entry of student files and training checkpoints that describes the network."""


class CheckpointError(UserError):
    """A weight file cannot be read or does not fit the model."""


class Checkpoint(NamedTuple):
    """Content of a weight file.

    Attributes:
        path: The file.
        states: State dicts by the name of their entry, such as "model" or "ema.module"; "" for the file itself.
        meta: The description that `save_student` or a training checkpoint holds; empty in other files.
        class_names: Names of the classes in the order of the outputs; empty if the file does not say.
    """

    path: Path
    states: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    class_names: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in a file without running code from it.

    A state dict may be the file itself or an entry of it: `{"model": state_dict}` (the public CIFAR-100 teacher bundle,
    and `save_student`), `{"state_dict": state_dict, "state_dict_ema": ...}`, `{"ema": {"module": state_dict}}`. Files
    ending in ".safetensors" are read as such, all others as `torch.save` files.

    Args:
        path: The file.

    Returns:
        All of its state dicts, on the CPU.

    Raises:
        UserError: If there is no such file.
        CheckpointError: If the file is damaged, holds more than tensors and plain values, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not a file (looked in {path.absolute().parent})")
    content = _read(path)
    fields = content if isinstance(content, Mapping) else {}
    states = dict(_state_dicts(fields))
    if not states:
        raise CheckpointError(
            f"{path} holds no state dict: expected {{'model': ...}}, {{'state_dict': ...}} or tensors by name, "
            f"found {type(content).__name__} with {', '.join(map(repr, list(fields)[:5])) or 'no entries'}"
        )
    meta = fields.get(DESCRIPTION)
    meta = meta if isinstance(meta, dict) else {}
    return Checkpoint(path, states, meta, _class_names(meta) or _class_names(fields))


def _read(path: Path) -> Any:
    """Return the content of a weight file; only tensors, plain containers and `argparse.Namespace` are unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (damaged := damaged_entry(path)):
            raise CheckpointError(f"{path} cannot be read: damaged ({damaged}). Fetch or write it again")
        # The reference training scripts of the CIFAR bundle store their options next to the weights.
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


def _state_dicts(fields: Mapping[Any, Any], name: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict]]:
    """Return every mapping of names to tensors by the name of its entry, without entries that are not tensors."""
    if not all(isinstance(key, str) for key in fields):
        return
    if tensors := {key: value for key, value in fields.items() if isinstance(value, Tensor)}:
        yield name, tensors
    for key, value in fields.items():
        if isinstance(value, Mapping) and depth > 0:
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth - 1)


def _class_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes, under the keys that training scripts commonly write; empty if there are none."""
    numbers = fields.get("class_to_idx")
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(sorted(numbers, key=numbers.__getitem__))
    names = next((fields[key] for key in ("class_names", "classes", "categories") if key in fields), ())
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(n, str) for n in names) else ()
