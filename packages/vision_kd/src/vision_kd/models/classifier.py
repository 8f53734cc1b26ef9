"""Classifiers: built-in networks and those of timm and torchvision, with their weights and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_common.registry import UnknownNameError, suggest
from vision_kd.models.checkpoints import STUDENT_FORMAT, load_weights, read_checkpoint
from vision_kd.models.normalized import Normalization, NormalizedNetwork
from vision_kd.models.registry import MODELS


@dataclass(frozen=True)
class ModelSpec:
    """Which network to build and where its weights come from.

    Args:
        name: a built-in network, "timm/<name>" or "torchvision/<name>".
        args: extra arguments of the network's constructor.
        checkpoint: weight file; with `pretrained`, a local copy of the published weights.
        pretrained: use the library's published weights and their normalisation; a string names one of torchvision's
            sets, such as IMAGENET1K_V1, instead of its default.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool | str = False


class Classifier(NormalizedNetwork):
    """A network behind its own input normalisation that maps images to logits.

    Args:
        network: maps normalised images (N, C, H, W) to logits (N, num_classes).
        mean: mean of each channel, for intensities in [0, 1].
        std: standard deviation of each channel, positive.
        num_classes: number of logits.
    """

    format = STUDENT_FORMAT

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], num_classes: int) -> None:
        super().__init__(network, mean, std)
        self.num_classes = num_classes

    def facts(self) -> dict[str, Any]:
        """See `NormalizedNetwork.facts`."""
        return super().facts() | {"num_classes": self.num_classes, "in_channels": self.in_channels}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Args:
            images: (N, C, H, W), floating point in [0, 1].

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: the images are not floating point, or have another number of channels.
        """
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"expected floating-point images (N, {self.in_channels}, H, W) in [0, 1], "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        return self.network(self.normalize(images).contiguous(memory_format=torch.channels_last))


def build_classifier(
    spec: ModelSpec, *, num_classes: int, in_channels: int = 3, mean: Sequence[float], std: Sequence[float]
) -> Classifier:
    """Build a network, load its weights and attach the normalisation that belongs to them.

    The normalisation is that of the published weights (`pretrained`) or of the student file (`checkpoint`
    written by `save_student`) where there is one, else `mean` and `std`.

    Args:
        spec: network and weights.
        num_classes: classes of the data.
        in_channels: channels of the images.
        mean: mean of each channel of the data, for intensities in [0, 1].
        std: standard deviation of each channel of the data.

    Raises:
        UnknownNameError: no network has this name.
        ValueError: the network rejects its arguments, channels or classes, or has no published weights.
        CheckpointError: the weight file is damaged or does not fit.
        ConnectionError: the published weights could not be downloaded.
    """
    library, _, name = spec.name.rpartition("/")
    builders = {"": _build_own, "timm": _build_timm, "torchvision": _build_torchvision}
    if library not in builders:
        raise UnknownNameError(f"unknown model {spec.name!r}: write a built-in name, timm/<name> or torchvision/<name>")
    try:
        network, published = builders[library](name, spec, num_classes, in_channels)
    except TypeError as error:
        raise ValueError(f"model {spec.name!r} rejects args {spec.args}: {error}") from error
    normalization = published or Normalization(mean, std)
    if spec.checkpoint is not None:
        checkpoint = read_checkpoint(spec.checkpoint)
        load_weights(network, checkpoint, model=spec.name, num_classes=num_classes)
        if checkpoint.meta.get("format") == STUDENT_FORMAT:
            normalization = Normalization(checkpoint.meta["mean"], checkpoint.meta["std"])
    if len(normalization.mean) != in_channels:
        raise ValueError(f"model {spec.name!r}: mean {normalization.mean} does not fit {in_channels} image channels")
    return Classifier(network, *normalization, num_classes)


Built = tuple[nn.Module, Normalization | None]


def _build_own(name: str, spec: ModelSpec, num_classes: int, in_channels: int) -> Built:
    builder = MODELS.get(name)
    if spec.pretrained:
        raise ValueError(f"model {name!r} has no published weights: set pretrained to false and give a checkpoint")
    return builder(num_classes=num_classes, in_channels=in_channels, **spec.args), None


def _build_torchvision(name: str, spec: ModelSpec, num_classes: int, in_channels: int) -> Built:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError(f"unknown torchvision classifier {name!r}{suggest(name, names)}")
    if in_channels != 3:
        raise ValueError(f"{spec.name!r} takes 3 channels, the images have {in_channels}: use a built-in or timm model")
    arguments = dict(num_classes=num_classes, **spec.args)
    if not spec.pretrained:
        return models.get_model(name, **arguments), None
    published = models.get_model_weights(name)
    tag = "DEFAULT" if spec.pretrained is True else str(spec.pretrained)
    if tag not in published.__members__:
        raise ValueError(
            f"model {spec.name!r} has no weights {tag!r}; pretrained can be {', '.join(published.__members__)}"
        )
    weights = published[tag]
    _require_classes(spec, len(weights.meta["categories"]), num_classes)
    try:
        network = models.get_model(name, weights=weights if spec.checkpoint is None else None, **arguments)
    except OSError as error:
        raise _not_downloaded(spec, weights.url) from error
    transforms = weights.transforms()
    return network, Normalization(transforms.mean, transforms.std)


def _build_timm(name: str, spec: ModelSpec, num_classes: int, in_channels: int) -> Built:
    import timm  # imported here because it takes seconds

    if not timm.is_model(name):
        raise UnknownNameError(f"unknown timm model {name!r}{suggest(name, timm.list_models())}")
    arguments = dict(num_classes=num_classes, in_chans=in_channels, **spec.args)
    if not spec.pretrained:
        return timm.create_model(name, **arguments), None
    published = timm.models.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ValueError(f"model {spec.name!r} has no published weights: set pretrained to false")
    _require_classes(spec, published.num_classes, num_classes)
    try:
        network = timm.create_model(name, pretrained=spec.checkpoint is None, **arguments)
    except OSError as error:
        hub = f"https://huggingface.co/{published.hf_hub_id}"
        raise _not_downloaded(spec, hub if published.hf_hub_id else str(published.url)) from error
    return network, Normalization(published.mean, published.std)


def _require_classes(spec: ModelSpec, published: int, num_classes: int) -> None:
    # Both libraries would otherwise put a random classifier on top without a word, or fail obscurely.
    if published != num_classes:
        raise ValueError(
            f"the published weights of {spec.name!r} have {published} classes, the data have {num_classes}: "
            "set pretrained to false, or give a checkpoint fine-tuned on these data"
        )


def _not_downloaded(spec: ModelSpec, url: str) -> ConnectionError:
    return ConnectionError(
        f"could not download the published weights of {spec.name!r} from {url}: "
        "fetch the file elsewhere and set checkpoint to its local path (pretrained stays true)"
    )


def count_parameters(module: nn.Module) -> int:
    """Number of scalar parameters, trainable or not; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
