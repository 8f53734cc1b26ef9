"""Classifiers: a network with its classes, its normalisation and the images that it takes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_common.errors import UserError
from vision_kd.models.checkpoints import Checkpoint, read_checkpoint
from vision_kd.models.libraries import build_network, current_name
from vision_kd.models.normalized import Normalization, NormalizedNetwork, check_class_names
from vision_kd.models.weights import load_weights

logger = logging.getLogger(__name__)

STUDENT_FORMAT = "vision_kd.student/1"
"""Key of a classifier's description in the files of `save_student` and in training checkpoints."""


DATA_SPEC = ("num_classes", "in_channels", "class_names", "image_size")
"""Fields on which data and classifiers have to agree."""


@dataclass(frozen=True)
class ModelSpec:
    """Choice of a network and of its weights.

    Args:
        name: A built-in network, "timm/<name>" or "torchvision/<name>".
        args: Extra arguments of the network's constructor.
        checkpoint: Weight file; with `pretrained`, a local copy of the published weights.
        pretrained: Use the library's published weights and their normalisation; a string names one of torchvision's
            sets, such as IMAGENET1K_V1, instead of its default.
        entry: Which network of a weight file that holds several, by the name of its entry or prefix.
        mean: Mean of each channel with which the weights of a file were trained; files written here know their own.
        std: Standard deviation of each channel to go with it.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool | str = False
    entry: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Classifier(NormalizedNetwork):
    """Network with its own input normalisation that maps images to logits.

    Args:
        network: Maps normalised images (N, C, H, W) to logits (N, num_classes).
        mean: Mean of each channel, for intensities in [0, 1].
        std: Standard deviation of each channel, positive.
        num_classes: Number of logits.
        class_names: Names of the classes in the order of the logits; empty if they are not known.
        image_size: Side in pixels of the images it is trained on; None if it is not known.
        name: Name in messages; the network's class by default.

    Raises:
        ValueError: Mean and std do not fit, or there are more or fewer names than logits.
    """

    format = STUDENT_FORMAT

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        *,
        class_names: Sequence[str] = (),
        image_size: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__(network, mean, std)
        if class_names and len(class_names) != num_classes:
            raise UserError(f"{len(class_names)} class names do not fit {num_classes} classes")
        self.num_classes, self.class_names, self.image_size = num_classes, tuple(class_names), image_size
        self.name = name or type(network).__name__

    def metadata(self) -> dict[str, Any]:
        """Add the metadata of classification to those of `NormalizedNetwork`."""
        known = {"class_names": list(self.class_names), "image_size": self.image_size}
        return (
            super().metadata()
            | {"num_classes": self.num_classes, "in_channels": self.in_channels}
            | {name: value for name, value in known.items() if value}
        )

    def check_data(
        self, what: str, *, num_classes: int, in_channels: int, class_names: Sequence[str], image_size: int | None
    ) -> None:
        """Raise for data on which the logits would have another meaning, or that the network cannot take.

        Another image size only gives a warning: convolutional networks take it, with another accuracy.

        Args:
            what: Name of this classifier, such as a file or "the teacher".
            num_classes: Classes of the data.
            in_channels: Channels of their images.
            class_names: Names of the classes; empty if they are not known.
            image_size: Side of the images in pixels; None if it is not known.

        Raises:
            ValueError: Classes, their names or their order, channels or size do not fit.
        """
        if self.num_classes != num_classes:
            raise UserError(f"{what} has {self.num_classes} classes, the data {num_classes}")
        check_class_names(what, self.class_names, class_names)
        if self.in_channels != in_channels:
            raise UserError(f"{what} takes images of {self.in_channels} channels, the data have {in_channels}")
        if image_size is None:
            return
        if self.image_size not in (None, image_size):
            logger.warning("%s was trained on images of %s pixels, the data have %s", what, self.image_size, image_size)
        self.check_images(image_size)

    def check_images(self, image_size: int) -> None:
        """Run the network, in evaluation mode, on one empty image of this size.

        Raises:
            ValueError: If it does not take such images; the message names network and size.
        """
        training, where = self.training, self._mean
        images = where.new_zeros(1, self.in_channels, image_size, image_size)
        try:
            with torch.no_grad():
                self.eval()(images)
        except ValueError as error:
            raise UserError(f"{error} (for images of {image_size} x {image_size} pixels)") from error
        # Each network has its own error for a wrong size: AssertionError, RuntimeError, IndexError, ...
        except Exception as error:
            raise UserError(
                f"model {self.name!r} does not take images of {image_size} x {image_size} pixels "
                f"({type(error).__name__}: {error}): change the data's image_size, or args of the model, as img_size"
            ) from error
        finally:
            self.train(training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images.

        Args:
            images: (N, C, H, W), floating point in [0, 1].

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: If the images are not floating point or have another number of channels, or if the network
                returns several outputs of which none is known to be the logits.
        """
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"expected floating-point images (N, {self.in_channels}, H, W) in [0, 1], "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        output = self.network(self.normalize(images).contiguous(memory_format=torch.channels_last))
        logits = main_output(output)
        if logits is None or logits.ndim != 2 or logits.shape[-1] != self.num_classes:
            raise UserError(
                f"model {self.name!r} returns {_described(output)}{' while training' if self.training else ''}, not "
                f"logits (N, {self.num_classes}): choose arguments, or wrap it, so that it returns its logits alone or "
                "as `logits` of a named tuple, dataclass or dict"
            )
        return logits


def main_output(output: Any) -> Tensor | None:
    """Return the logits among a network's outputs, without auxiliary ones; None if they cannot be told apart."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    entries = f" of {len(output)} entries" if hasattr(output, "__len__") else ""
    return f"a {type(output).__name__}{entries}"


def build_classifier(
    spec: ModelSpec,
    *,
    num_classes: int,
    in_channels: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    image_size: int | None = None,
) -> Classifier:
    """Build a network, load its weights and attach the classes and the normalisation that belong to them.

    The normalisation has several sources. A file of `save_student`, or `spec.mean` and `spec.std`, state it. Published
    weights (`pretrained`) have their own. Other files of timm and torchvision networks use the library's training
    default. Networks without weights, and other files of built-in ones, take `mean` and `std`.

    Args:
        spec: Network and weights.
        num_classes: Classes of the data.
        in_channels: Channels of the images.
        mean: Mean of each channel of the data, for intensities in [0, 1].
        std: Standard deviation of each channel of the data.
        class_names: Names of the data's classes, to compare with those of the file.
        image_size: Side of the data's images in pixels, which the network is then tried on.

    Raises:
        UnknownNameError: If no network has this name.
        ValueError: The network rejects its arguments, channels, classes or images, or has no published weights; or the
            weights were trained on other classes.
        CheckpointError: If the weight file is damaged or does not fit.
        UserError: If the published weights could not be downloaded.
    """
    built = build_network(
        spec.name,
        num_classes=num_classes,
        in_channels=in_channels,
        args=spec.args,
        pretrained=spec.pretrained,
        download=spec.checkpoint is None,
    )
    names, size = tuple(class_names), image_size
    what = spec.checkpoint or f"model {spec.name!r}"
    file = None if spec.checkpoint is None else read_checkpoint(spec.checkpoint)
    if file is not None:
        check_class_names(what, file.class_names, names)
        states = {
            entry: {current_name(name): tensor for name, tensor in state.items()}
            for entry, state in file.states.items()
        }
        load_weights(
            built.network,
            file._replace(states=states),
            model=spec.name,
            num_classes=num_classes,
            entry=spec.entry,
            surplus=built.surplus,
        )
        names = file.class_names or names
        size = file.meta.get("image_size") if file.meta.get("format") == STUDENT_FORMAT else size
    if spec.pretrained and built.published is not None:
        built.published.check_classes(what, names)
        size = built.published.image_size
    library = built.published and built.published.normalization
    normalization = choose_normalization(
        spec,
        file,
        STUDENT_FORMAT,
        library,
        Normalization(tuple(mean), tuple(std)),
        usual=spec.name.startswith("timm/"),  # training defaults to the network's own normalisation
    )
    if len(normalization.mean) != in_channels:
        raise UserError(f"model {spec.name!r}: mean {normalization.mean} does not fit {in_channels} image channels")
    made = Classifier(built.network, *normalization, num_classes, class_names=names, image_size=size, name=spec.name)
    made.check_data(
        what, num_classes=num_classes, in_channels=in_channels, class_names=class_names, image_size=image_size
    )
    made.image_size = image_size or size
    return made


def choose_normalization(
    spec: ModelSpec,
    file: Checkpoint | None,
    own_format: str,
    library: Normalization | None,
    data: Normalization,
    *,
    usual: bool,
) -> Normalization:
    """Return the mean and standard deviation with which the weights were trained.

    Args:
        spec: Network and weights.
        file: The weight file, if there is one.
        own_format: Key that marks a file whose description holds them.
        library: Normalisation of the weights published by the network's library; None for a built-in one.
        data: Normalisation of the data, for networks without weights and files without one.
        usual: Whether files that do not say were trained with the library's.

    Raises:
        ValueError: If the settings state only one of the two, or others than the file.
    """
    stated = None
    if spec.mean is not None or spec.std is not None:
        if spec.mean is None or spec.std is None:
            raise UserError(f"model {spec.name!r}: set mean and std together, got {spec.mean} and {spec.std}")
        stated = Normalization(tuple(spec.mean), tuple(spec.std))
    if file is not None and file.meta.get("format") == own_format:
        own = Normalization(tuple(file.meta["mean"]), tuple(file.meta["std"]))
        if stated not in (None, own):
            raise UserError(
                f"{file.path} was trained with mean {own.mean} and std {own.std}; leave out the settings mean and std"
            )
        return own
    if stated is not None or library is None or (file is None and not spec.pretrained):
        return stated or data
    if spec.pretrained:
        return library
    taken = library if usual and len(library.mean) == len(data.mean) else data
    if library != data:
        logger.warning(
            "%s does not say with which mean and std it was trained: %s and %s are taken, its library publishes "
            "weights of %s with %s and %s. The settings mean and std beside checkpoint state others",
            spec.checkpoint,
            *taken,
            spec.name,
            *library,
        )
    return taken
