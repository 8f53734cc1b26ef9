"""Student files, which hold weights and a description that rebuilds their classifier; and exported programs."""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_common.errors import UserError
from kd_common.files import write_atomically
from vision_kd.models.checkpoints import DESCRIPTION, CheckpointError, read_checkpoint
from vision_kd.models.classifier import STUDENT_FORMAT, Classifier, ModelSpec, build_classifier
from vision_kd.models.normalized import NormalizedNetwork


def save_student(
    path: str | Path, student: NormalizedNetwork, spec: ModelSpec, extra: dict[str, Any] | None = None
) -> None:
    """Write the network's weights and the metadata to rebuild it; an interrupted call leaves the old file.

    Plain PyTorch reads it: `network.load_state_dict(torch.load(path, weights_only=True)["model"])`.

    Args:
        path: The file; missing folders are made.
        student: Classifier or detector; its network is written.
        spec: How that network was built.
        extra: Further plain values (text, numbers, lists, dicts) for the "meta" entry, such as the accuracy.

    Raises:
        TypeError: If a value could not be read back without running code, or takes the name of one of our entries.
        OSError: If it cannot be written; the message names the file.
    """
    meta = dict(**describe(student, spec), **(extra or {}))
    for key, value in meta.items():
        if not _is_plain(value):
            raise TypeError(f"{key!r} of a student file must be text, numbers, lists or dicts, got {value!r}")
    # Contiguous clones keep a view's whole storage and our memory layout out of the file.
    state = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in student.network.state_dict().items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"model": state, DESCRIPTION: meta}, content)
    write_atomically(path, content.getbuffer())


def describe(network: NormalizedNetwork, spec: ModelSpec) -> dict[str, Any]:
    """Return the plain values that rebuild a network around its weights."""
    return dict(format=network.format, name=spec.name, args=spec.args, **network.metadata())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def load_classifier(path: str | Path) -> Classifier:
    """Rebuild a classifier, in evaluation mode, from a file that `save_student` wrote.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file was not written by `save_student`.
    """
    meta = read_checkpoint(path).meta
    if meta.get("format") != STUDENT_FORMAT:
        raise CheckpointError(
            f"{path} does not describe its network (format {meta.get('format')!r}, expected {STUDENT_FORMAT!r}): "
            "name the network with build_classifier(ModelSpec(name, checkpoint=...), ...)"
        )
    names = ("num_classes", "in_channels", "mean", "std")
    if missing := [key for key in ("name", "args", *names) if key not in meta]:
        raise CheckpointError(f"{path} does not describe its network: it lacks {', '.join(missing)}; write it again")
    spec = ModelSpec(meta["name"], meta["args"], checkpoint=str(path))
    data_spec = {key: meta[key] for key in (*names, "class_names", "image_size") if key in meta}
    return build_classifier(spec, **data_spec).eval()


def check_program(path: str | Path) -> None:
    """Raise for a name under which no exported program can be written.

    Raises:
        UserError: If the file does not end in ".pt2".
    """
    if Path(path).suffix != ".pt2":
        raise UserError(f"exported programs end in .pt2, got {str(path)!r}")


def export(classifier: Classifier, path: str | Path, example: Tensor) -> None:
    """Write a `torch.export` program of the classifier in evaluation mode, on the CPU, for any batch size.

    It needs no code of this project: `torch.export.load(path).module()(images)`.

    Args:
        classifier: The classifier, left unchanged.
        path: The file, ending in ".pt2".
        example: Images (N, C, H, W); the program takes their C, H and W.

    Raises:
        UserError: If the file does not end in ".pt2".
    """
    check_program(path)
    # The tracer would take a batch of one for a constant.
    images = example[:1].detach().cpu().repeat(2, 1, 1, 1)
    batch = torch.export.Dim("batch")
    # torch.export.save takes weights in another layout for slices of larger tensors, and warns.
    model = copy.deepcopy(classifier).cpu().to(memory_format=torch.contiguous_format).eval()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
