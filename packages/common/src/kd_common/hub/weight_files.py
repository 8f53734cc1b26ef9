"""Checks that a model was made of exactly the tensors that its folder holds."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kd_common.errors import UserError
from kd_common.files import read_json

HINT = "fetch or save the model again"

ADAPTER = "adapter_config.json"

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files in the order in which transformers looks for them."""

WRAPPER = r"(?<![A-Za-z0-9_])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
"""Parts that torch.compile, FSDP, activation checkpointing, DDP and AveragedModel add to the names of tensors."""

AVERAGED = "n_averaged"
"""Entries that AveragedModel saves besides the weights."""

SHOWN = 4

NOT_REAL = ("C", "I", "U", "BOOL")
"""Prefixes of the types of complex numbers, integers and truth values in safetensors."""

UNUSABLE = ("C", "torch.complex", "meta")
"""Prefixes of the types that no weight has."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ModelFilesError(UserError):
    """A model's folder is damaged, would run code, or does not fit; the message names it."""


class StoredWeights(NamedTuple):
    """The weight files of a folder.

    Attributes:
        files: Where each tensor is.
        not_real: Names of tensors of complex numbers, integers or truth values, with their type.
    """

    files: dict[str, Path]
    not_real: dict[str, str]

    @property
    def wrapped(self) -> bool:
        """Return whether the tensors' names contain parts that a wrapper adds."""
        return any(re.search(WRAPPER, name) for name in self.files)


def check_no_adapter(folder: Path) -> None:
    """Raise for the folder of an adapter, as peft writes it; transformers may or may not read it as a model.

    Raises:
        ModelFilesError: Naming the base model and how to merge the adapter into it.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return
    settings = read_json(path, HINT)
    base = settings.get("base_model_name_or_path")
    beside = (folder / "config.json").is_file()
    merged = f"; if the weights in it hold the adapter already, remove {ADAPTER}" if beside else ""
    raise ModelFilesError(
        f"{folder} holds an adapter ({settings.get('peft_type', 'of peft')}) for the base model {base}, not a model. "
        'Merge it first: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('MERGED')\", copy the tokenizer's "
        f"files into MERGED, and give that folder{merged}"
    )


def stored_weights(folder: Path) -> StoredWeights:
    """Return the files and types of the tensors that transformers will load; only headers are read.

    Raises:
        ModelFilesError: If a shard is missing or left over, a tensor is stored twice, complex or without values, or the
            folder holds two different sets of weights.
    """
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        return StoredWeights({}, {})
    chosen = _files_of_tensors(folder, found[0])
    for other in found[1:]:
        try:
            differing = _first_difference(chosen, _files_of_tensors(folder, other))
        except pickle.UnpicklingError:  # the file may hold anything; transformers does not open it either
            continue
        if differing is not None:
            raise ModelFilesError(
                f"{folder} holds two models: {differing} differs between {found[0]} and {other}. Keep the files of one"
            )
    not_real = {}
    for path in dict.fromkeys(chosen.values()):
        for name, kind in _kinds(path).items():
            if kind is not None:
                not_real[name] = kind
    if unusable := [f"{name} {kind}" for name, kind in not_real.items() if kind.startswith(UNUSABLE)]:
        raise ModelFilesError(
            f"{folder}: {len(unusable)} tensors are complex or without values ({shown(unusable)}); {HINT}"
        )
    return StoredWeights(chosen, not_real)


def check_whole(name: str, model: Any, report: Mapping[str, Any], stored: StoredWeights) -> None:
    """Raise unless a model is made of exactly the stored tensors.

    Args:
        name: The model's, for the message.
        model: Model as loaded by transformers.
        report: Loading report of transformers (`output_loading_info`), without tensors of other shapes.
        stored: Tensors in the files; empty if they are not known.

    Raises:
        ModelFilesError: Listing tensors that are missing, left over, of another shape or type, or not finite.
    """
    state = model.state_dict()
    averaged = {AVERAGED} if AVERAGED in stored.files else set()
    reshaped = [f"{key} {tuple(kept)} instead of {tuple(asked)}" for key, kept, asked in report["mismatched_keys"]]
    quantised = getattr(model.config, "quantization_config", None) is not None
    faults = {
        "missing, so that they would be drawn at random": report["missing_keys"],
        "left over": set(report["unexpected_keys"]) - averaged,
        "of another shape": reshaped,
        "not of real numbers": [] if quantised else _miscast(model, state, stored, averaged),
        f"not finite as {model.dtype}": not_finite(state),
        "unreadable": report["error_msgs"],
    }
    listed = "; ".join(f"{len(keys)} {what} ({shown(keys)})" for what, keys in faults.items() if keys)
    if listed:
        raise ModelFilesError(
            f"{name}: the stored tensors do not make the {type(model).__name__} of its config.json: {listed}. "
            f"{HINT[0].upper()}{HINT[1:]}, whole and unwrapped, with save_pretrained"
        )


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity; takes about a second for a billion numbers."""
    # The extremes cost a tenth of a look at every entry; both are NaN if any entry is.
    extremes = {
        name: torch.stack(tensor.aminmax())
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.dtype in FLOATS and tensor.numel()
    }
    return [name for name, pair in extremes.items() if not pair.isfinite().all()]


def shown(items: Iterable[str]) -> str:
    """Return the first few items in order, and how many more there are."""
    names = sorted(items)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _miscast(model: Any, state: Mapping[str, Tensor], stored: StoredWeights, known: set[str]) -> list[str]:
    """Return the stored tensors of integers, complex numbers or truth values that became real weights."""
    prefix = model.base_model_prefix
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"(^|\.)position_ids$"]
    found = []
    for name, kind in stored.not_real.items():
        plain = re.sub(WRAPPER, "", name)
        places = (plain, f"{prefix}.{plain}", plain.removeprefix(f"{prefix}."))
        tensor = next((state[place] for place in places if place in state), None)
        counts = tensor is not None and not tensor.is_floating_point()
        if not (counts or name in known or any(re.search(pattern, plain) for pattern in ignored)):
            found.append(f"{name} {kind}")
    return found


def _files_of_tensors(folder: Path, name: str) -> dict[str, Path]:
    """Return the file of every tensor, of a single file or of the shards that an index lists."""
    path = folder / name
    if not name.endswith(".index.json"):
        _check_no_other_shards(folder, name, set())
        return dict.fromkeys(_kinds(path), path)
    places = read_json(path, HINT).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelFilesError(f"{path} is damaged: its weight_map does not map tensors to files; {HINT}")
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelFilesError(f"{path} lists {len(missing)} files that are missing ({shown(missing)}); {HINT}")
    _check_no_other_shards(folder, name.removesuffix(".index.json"), set(shards))
    found: dict[str, Path] = {}
    twice = []
    for shard in shards:
        for tensor in _kinds(folder / shard):
            twice += [tensor] if tensor in found else []
            found[tensor] = folder / shard
    if twice:
        raise ModelFilesError(f"{folder}: {len(twice)} tensors stand in two shards ({shown(twice)}); {HINT}")
    if absent := places.keys() - found.keys():
        raise ModelFilesError(f"{path} lists {len(absent)} tensors that no shard holds ({shown(absent)}); {HINT}")
    return found


def _check_no_other_shards(folder: Path, single: str, listed: set[str]) -> None:
    stem, _, suffix = single.rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    others = {path.name for path in folder.iterdir() if pattern.fullmatch(path.name)} - listed
    if others and (listed or not (folder / f"{single}.index.json").is_file()):
        raise ModelFilesError(
            f"{folder}: {len(others)} files of weights are left over ({shown(others)}), of another model or an "
            f"interrupted save; remove them, or {HINT}"
        )


def _kinds(path: Path) -> dict[str, str | None]:
    """Return the names of the tensors in a file, with the type of those that are not of real numbers."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
        return {name: kind if kind.startswith(NOT_REAL) else None for name, kind in types.items()}
    return {name: _kind(tensor) for name, tensor in _unpickled(path).items()}


def _kind(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "meta"
    return None if tensor.is_floating_point() else str(tensor.dtype)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `torch.save`, in the memory map where its format has one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # of a format before version 1.6
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ModelFilesError(f"{path} holds no tensors by name, but {type(content).__name__}; {HINT}")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _first_difference(first: Mapping[str, Path], second: Mapping[str, Path]) -> str | None:
    """Return the name of a tensor whose shape or first row differs between two sets of files; None if all agree."""
    ones, others = _samples(first), _samples(second)
    for name in sorted(ones.keys() & others.keys()) or [next(iter(others), "every tensor")]:
        (shape, one), (shape_, other) = (samples.get(name, ((), torch.empty(0))) for samples in (ones, others))
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)  # one may be a rounded copy
        if shape != shape_ or not torch.equal(one.to(narrow), other.to(narrow)):
            return name
    return None


def _samples(files: Mapping[str, Path]) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Return the shape and first row of tensors, without reading the rest."""
    found = {}
    for path in dict.fromkeys(files.values()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[name] = (shape, part[:1] if shape else file.get_tensor(name))
        else:
            for name, tensor in _unpickled(path).items():
                found[name] = (tuple(tensor.shape), tensor[:1] if tensor.ndim else tensor)
    return found
