"""Drafters on disk: weights as safetensors, settings and the target's fingerprint as JSON."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kd_common.errors import UserError
from kd_common.files import read_json, write_temporary
from kd_common.hub.weight_files import WRAPPER, shown
from kd_common.registry import subclasses, suggest
from spec_decode.decoding.cost import check_acceptance
from spec_decode.drafters.base import Drafter
from spec_decode.drafters.trainable import TrainableDrafter, check_vocabulary
from spec_decode.models import CausalLM

WEIGHTS, CONFIG = "drafter.safetensors", "drafter.json"
ENTRIES = {
    "drafter": dict,
    "target_fingerprint": str,
    "target_sizes": dict,
    "feature_layers": list,
    "acceptance": list | None,
    "weights_crc32": int,
}
"""What a drafter's JSON file holds at least."""

REMEDY = "copy the folder again, or train the drafter again"

FOREIGN = re.compile("eagle|medusa|hydra|draft|speculat|dflash|dspark", re.IGNORECASE)
"""What names the kind, or a setting, in the config.json of other programs' drafters."""


def save_drafter(drafter: TrainableDrafter, folder: Path, meta: Mapping[str, Any]) -> None:
    """Write a drafter; each file is complete or absent, the settings come last, and a full disk leaves the old one.

    Args:
        drafter: Trained drafter.
        folder: Folder to write to.
        meta: Further facts for the JSON file, such as the target's name and measurements.

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS, folder / CONFIG
    state = {name: value.detach().cpu().contiguous() for name, value in drafter.state_dict().items()}
    packed = save(state)
    content = {
        **meta,
        "drafter": {"name": type(drafter).__name__, "settings": drafter.settings},
        "target_fingerprint": drafter.target.fingerprint(),
        "target_sizes": target_sizes(drafter.target),
        "feature_layers": list(drafter.target.feature_layers),
        "acceptance": drafter.acceptance,
        "weights_crc32": zlib.crc32(packed),
    }
    # Everything is on the disk before anything of the drafter that lies there is touched.
    write_temporary(weights, packed, Path(f"{weights}.part"))
    try:
        write_temporary(config, json.dumps(content, indent=2) + "\n", Path(f"{config}.part"))
    except OSError:
        Path(f"{weights}.part").unlink()
        raise
    config.unlink(missing_ok=True)  # a kill between the two must not leave weights beside another's settings
    os.replace(f"{weights}.part", weights)
    os.replace(f"{config}.part", config)


def target_sizes(target: CausalLM) -> dict[str, int]:
    """Sizes that tell most targets apart, under the names that transformers' configurations have for them."""
    return {
        "num_hidden_layers": len(target.layers),
        "hidden_size": target.shape.hidden_size,
        "vocab_size": target.vocab_size,
    }


def check_target_sizes(folder: Path, config: Mapping[str, Any], target: Any, name: str) -> None:
    """Refuse a target of other sizes than those of the one a drafter was trained for, before it is loaded.

    Args:
        folder: The drafter's folder.
        config: What `read_config` returned.
        target: transformers' configuration of the target.
        name: The target's name.

    Raises:
        UserError: Naming both targets.
    """
    trained = config["target_sizes"]
    found = {size: getattr(target, size, None) for size in trained}
    if found != trained:
        differing = ", ".join(f"{size} {found[size]} instead of {trained[size]}" for size in trained)
        raise UserError(
            f"the drafter in {folder} was trained for another target, {config.get('target', 'unnamed')}, than {name}: "
            f"{differing}. Leave --target out, or train a drafter for {name}"
        )


def holds_language_model(folder: Path) -> bool:
    """Return whether a folder is one that transformers wrote for a language model, which drafts as it is.

    Raises:
        UserError: For a drafter that another program wrote: read as a language model it would lack most weights.
    """
    path = folder / "config.json"
    if (folder / CONFIG).is_file() or not path.is_file():
        return False
    settings = read_json(path, "copy the folder again")
    kinds = [settings.get("model_type"), *(settings.get("architectures") or [])]
    named = [word for word in map(str, [*kinds, *settings]) if FOREIGN.search(word)]
    if named:
        raise UserError(
            f"{folder} holds a drafter that another program wrote ({path.name}: {shown(named)}), which is not read "
            "here; train one with spec_decode.fit, or give a language model of the target's tokenizer"
        )
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """Read the JSON file of a saved drafter.

    Raises:
        UserError: If the folder holds no complete drafter, or if it is damaged.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        hint = suggest(str(folder), subclasses(Drafter))
        raise UserError(f"{folder} holds no drafter: there is no such folder, and no drafter of this name{hint}")
    if not path.is_file():
        inside = [found.parent.name for found in sorted(folder.glob(f"*/{CONFIG}"))]
        remedy = f"give one of {', '.join(str(folder / name) for name in inside)}" if inside else "it is written last"
        raise UserError(f"{folder} holds no drafter: {CONFIG} is missing; {remedy}")
    content = read_json(path, REMEDY)
    for name, kind in ENTRIES.items():
        if name not in content or not isinstance(content[name], kind):
            raise UserError(f"{path} is damaged: {name} is {content.get(name)!r}; {REMEDY}")
    try:
        check_acceptance(content["acceptance"] or [])
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {REMEDY}") from error
    return content


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights of a saved drafter.

    Args:
        folder: Its folder.
        config: What `read_config` returned.

    Raises:
        UserError: If there are none, or if they are damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY}")
    content = path.read_bytes()
    if zlib.crc32(content) != config["weights_crc32"]:
        raise UserError(f"{path} is damaged, or not the file that its {CONFIG} was written with; {REMEDY}")
    try:
        return {re.sub(WRAPPER, "", name): value for name, value in load(content).items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from error


def check_whole(
    path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Refuse weights that are not exactly those a drafter is made of.

    Args:
        path: Their file.
        found: What it holds.
        expected: The state of a drafter of the same settings.
        dtype: Precision that they will be used in.

    Raises:
        UserError: Listing tensors that are missing, left over, of another shape or type, or not finite.
    """
    both = [(name, found[name], expected[name]) for name in sorted(found.keys() & expected.keys())]
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
            for name, ours, theirs in both
            if ours.shape != theirs.shape
        ],
        "of another type": [
            f"{name} {ours.dtype}"
            for name, ours, theirs in both
            if ours.is_floating_point() != theirs.is_floating_point() or ours.is_complex()
        ],
        f"not finite in {dtype}": [
            name for name, ours, _ in both if ours.is_floating_point() and not ours.to(dtype).isfinite().all()
        ],
    }
    listed = "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in faults.items() if names)
    if listed:
        raise UserError(f"{path} does not fit its {CONFIG}: tensors {listed}; {REMEDY}")


def load_drafter(folder: Path, target: CausalLM) -> TrainableDrafter:
    """Load a saved drafter in the target's type on its device, ready to decode.

    Raises:
        UserError: If the folder holds no complete drafter, or if it was trained for another target, or its weights or
            vocabulary do not fit.
    """
    config = read_config(folder)
    if config["target_fingerprint"] != (found := target.fingerprint()):
        raise UserError(
            f"the drafter in {folder} was trained for another target ({config.get('target', 'unnamed')}, fingerprint "
            f"{config['target_fingerprint']}); this one, in {str(target.dtype).removeprefix('torch.')}, has "
            f"fingerprint {found}. Load that target, without a --dtype that rounds its weights, or train a drafter"
        )
    try:
        kind = subclasses(TrainableDrafter)[config["drafter"]["name"]]
        drafter = kind(**config["drafter"]["settings"]).bind(target)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / CONFIG} does not describe a drafter: {error}; {REMEDY}") from error
    weights = read_weights(folder, config)
    check_whole(folder / WEIGHTS, weights, drafter.state_dict(), target.dtype)
    drafter.load_state_dict(weights)
    if drafter.vocabulary is not None:
        check_vocabulary(drafter.vocabulary, drafter.draft_tokens, target.vocab_size)
    drafter.acceptance = config["acceptance"]
    return drafter.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def for_inference(drafter: TrainableDrafter) -> TrainableDrafter:
    """Return a copy of a drafter in its target's type, frozen; the drafter itself goes on training."""
    copy = drafter.untrained()
    copy.load_state_dict(drafter.state_dict())
    copy.acceptance = drafter.acceptance
    return copy.to(device=drafter.target.device, dtype=drafter.target.dtype).eval().requires_grad_(False)


def frequent_tokens(counts: torch.Tensor, size: int) -> torch.Tensor:
    """Draft vocabulary of the most frequent tokens.

    Args:
        counts: Occurrences of every target token, int64 of shape (V,).
        size: Tokens to take, in [1, V]; of equally frequent ones those of lower id.

    Returns:
        Ascending token ids, int64 of shape (size,).
    """
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
