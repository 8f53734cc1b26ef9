"""Drafters on disk: weights as safetensors, settings and the target's fingerprint as JSON."""

import inspect
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kd_common.files import read_json, write_aside
from kd_common.registry import suggest
from spec_decode.cost import check_acceptance
from spec_decode.drafters.registry import DRAFTERS
from spec_decode.drafters.trainable import TrainableDrafter, check_vocabulary
from spec_decode.models import CausalLM

WEIGHTS, CONFIG = "drafter.safetensors", "drafter.json"
ENTRIES = {"drafter": dict, "target_fingerprint": str, "feature_layers": list, "acceptance": list | None}
"""What a drafter's JSON file holds at least."""

REMEDY = "copy the folder again, or train the drafter again"


@dataclass(frozen=True)
class DrafterSpec:
    """Which drafter to build, and its settings.

    Args:
        name: Name in `DRAFTERS`.
        options: Keyword arguments of its class.
    """

    name: str = "fast_eagle"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, target: CausalLM) -> TrainableDrafter:
        """A new drafter for this target, in fp32 on the target's device.

        Raises:
            ValueError: For a drafter without parameters, an unknown option or one out of range.
        """
        kind = DRAFTERS.get(self.name)
        if not issubclass(kind, TrainableDrafter):
            raise ValueError(f"drafter {self.name!r} has no parameters to train or load; use it directly")
        known = {p.name: p.annotation for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for option, value in self.options.items():
            if option not in known:
                hint = suggest(option, known)
                raise ValueError(f"drafter {self.name!r} has no option {option!r}{hint} (known: {', '.join(known)})")
            kinds = get_args(known[option]) if isinstance(known[option], UnionType) else (known[option],)
            if all(isinstance(kind, type) for kind in kinds) and not isinstance(value, kinds):
                expected = inspect.formatannotation(known[option])
                raise ValueError(f"option {option} of drafter {self.name!r} must be {expected}, got {value!r}")
        return kind(target, **self.options).float().to(target.device)


def save_drafter(drafter: TrainableDrafter, spec: DrafterSpec, folder: Path, meta: Mapping[str, Any]) -> None:
    """Write a drafter; each file is complete or absent, the settings come last, and a full disk leaves the old one.

    Args:
        drafter: Trained drafter.
        spec: What it was built from.
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
        "drafter": asdict(spec),
        "target_fingerprint": drafter.target.fingerprint(),
        "feature_layers": list(drafter.target.feature_layers),
        "acceptance": drafter.acceptance,
        "weights_crc32": zlib.crc32(packed),
    }
    # Everything is on the disk before anything of the drafter that lies there is touched.
    write_aside(weights, packed, Path(f"{weights}.part"))
    try:
        write_aside(config, json.dumps(content, indent=2) + "\n", Path(f"{config}.part"))
    except OSError:
        Path(f"{weights}.part").unlink()
        raise
    config.unlink(missing_ok=True)  # a kill between the two must not leave weights beside another's settings
    os.replace(f"{weights}.part", weights)
    os.replace(f"{config}.part", config)


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON file of a saved drafter.

    Raises:
        FileNotFoundError: If the folder holds no complete drafter.
        ValueError: If it is damaged.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no drafter: there is no such folder, and no drafter of this name")
    if not path.is_file():
        inside = [found.parent.name for found in sorted(folder.glob(f"*/{CONFIG}"))]
        remedy = f"give one of {', '.join(str(folder / name) for name in inside)}" if inside else "it is written last"
        raise FileNotFoundError(f"{folder} holds no drafter: {CONFIG} is missing; {remedy}")
    content = read_json(path, REMEDY)
    for name, kind in ENTRIES.items():
        if name not in content or not isinstance(content[name], kind):
            raise ValueError(f"{path} is damaged: {name} is {content.get(name)!r}; {REMEDY}")
    try:
        check_acceptance(content["acceptance"] or [])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {REMEDY}") from error
    return content


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a saved drafter.

    Args:
        folder: Its folder.
        config: What `read_config` returned.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {REMEDY}")
    content = path.read_bytes()
    # Drafters of earlier versions carry no checksum.
    if zlib.crc32(content) != config.get("weights_crc32", zlib.crc32(content)):
        raise ValueError(f"{path} is damaged, or not the file that its {CONFIG} was written with; {REMEDY}")
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error


def load_drafter(folder: Path, target: CausalLM) -> TrainableDrafter:
    """A saved drafter in the target's type on its device, ready to decode.

    Raises:
        FileNotFoundError: If the folder holds no complete drafter.
        ValueError: If it was trained for another target, or its weights or vocabulary do not fit.
    """
    config = read_config(folder)
    if config["target_fingerprint"] != (found := target.fingerprint()):
        raise ValueError(
            f"the drafter in {folder} was trained for another target ({config.get('target', 'unnamed')}, fingerprint "
            f"{config['target_fingerprint']}); this one, in {str(target.dtype).removeprefix('torch.')}, has "
            f"fingerprint {found}. Load that target, without a --dtype that rounds its weights, or train a drafter"
        )
    try:
        drafter = DrafterSpec(**config["drafter"]).build(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a drafter: {error}; {REMEDY}") from error
    try:
        drafter.load_state_dict(read_weights(folder, config))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    if drafter.vocabulary is not None:
        check_vocabulary(drafter.vocabulary, drafter.draft_tokens, target.vocab_size)
    drafter.acceptance = config["acceptance"]
    return drafter.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def for_inference(drafter: TrainableDrafter, spec: DrafterSpec) -> TrainableDrafter:
    """A copy of a drafter in its target's type, frozen; the drafter itself goes on training."""
    copy = spec.build(drafter.target)
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
