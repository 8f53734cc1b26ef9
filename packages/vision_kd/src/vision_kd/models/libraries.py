"""Networks by name: the built-in ones, and those of timm and torchvision with the settings of their training."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from kd_common.errors import UserError
from kd_common.registry import UnknownNameError, suggest
from vision_kd.models.normalized import Normalization, check_class_names
from vision_kd.models.registry import MODELS

logger = logging.getLogger(__name__)

IMAGENET = 1000
SYNSET = re.compile(r"n\d{8}")
"""Pattern of ImageNet's class folders; sorted, they have the order of all published outputs."""


AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Auxiliary heads of torchvision networks, which help in training and have no part in the logits."""

OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")
"""Module names in torchvision's published densenet files, which are older than its code."""


class Published(NamedTuple):
    """Description by a library of the weights that it publishes for a network.

    Attributes:
        normalization: Mean and standard deviation of the images.
        image_size: Side of the images that they were trained on.
        class_names: Names of the outputs; empty if the library has none.
    """

    normalization: Normalization
    image_size: int
    class_names: tuple[str, ...] = ()

    def check_classes(self, what: str, asked: Sequence[str]) -> None:
        """Raise for data that have the published classes in another order; report if names cannot be compared.

        Raises:
            UserError: If the data's classes are in another order.
        """
        synsets = len(asked) == IMAGENET and all(map(SYNSET.fullmatch, asked)) and list(asked) == sorted(asked)
        if not asked or synsets:
            return
        if set(asked) == set(self.class_names):
            check_class_names(what, self.class_names, asked)
            return
        logger.warning(
            "The classes of the data (%s, ...) have other names than the published outputs of %s (%s, ...), so that "
            "their order cannot be compared; it must be the same",
            ", ".join(asked[:3]),
            what,
            ", ".join(self.class_names[:3]) or "without names",
        )


class Built(NamedTuple):
    """A network by name.

    Attributes:
        network: The network.
        published: Description of the published weights by their library; None for built-in networks.
        auxiliary: Names of heads that files may hold and this network does not have or need.
    """

    network: nn.Module
    published: Published | None = None
    auxiliary: tuple[str, ...] = ()

    def surplus(self, name: str) -> bool:
        """Return whether a tensor of a file belongs to an auxiliary head."""
        return name.split(".")[0] in self.auxiliary


def current_name(name: str) -> str:
    """Return the name that libraries give a tensor today."""
    found = OLD_DENSENET.fullmatch(name)
    return found[1] + found[2] if found else name


def build_network(
    full_name: str,
    *,
    num_classes: int,
    in_channels: int,
    args: dict[str, Any],
    pretrained: bool | str,
    download: bool,
) -> Built:
    """Return a network by name, with published weights if requested, and the library's description of these weights.

    Args:
        full_name: A built-in network, "timm/<name>" or "torchvision/<name>".
        num_classes: Classes of the data.
        in_channels: Channels of the images.
        args: Extra arguments of the network's constructor.
        pretrained: Whether the weights are the published ones; a string names one of torchvision's sets.
        download: Whether to fetch them; otherwise the network is made for a local copy of them.

    Raises:
        UnknownNameError: If no network has this name.
        UserError: If the network rejects its arguments, channels or classes, or has no published weights, or if the
            published weights could not be downloaded.
    """
    library, _, name = full_name.rpartition("/")
    builders: dict[str, Callable[..., Built]]
    builders = {"": _build_own, "timm": _build_timm, "torchvision": _build_torchvision}
    if library not in builders:
        raise UnknownNameError(f"unknown model {full_name!r}: write a built-in name, timm/<name> or torchvision/<name>")
    try:
        return builders[library](name, num_classes, in_channels, args, pretrained, download)
    except TypeError as error:
        raise UserError(f"model {full_name!r} rejects args {args}: {error}") from error


def _build_own(
    name: str, num_classes: int, in_channels: int, args: dict[str, Any], pretrained: bool | str, download: bool
) -> Built:
    try:
        builder = MODELS.get(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}. A network of your own needs --import MODULE, which registers it") from error
    if pretrained:
        raise UserError(f"model {name!r} has no published weights: set pretrained to false and give a checkpoint")
    return Built(builder(num_classes=num_classes, in_channels=in_channels, **args))


def _build_torchvision(
    name: str, num_classes: int, in_channels: int, args: dict[str, Any], pretrained: bool | str, download: bool
) -> Built:
    from torchvision import models

    full_name, names = f"torchvision/{name}", models.list_models(module=models)
    if name not in names:
        raise UnknownNameError(f"unknown torchvision classifier {name!r}{suggest(name, names)}")
    if in_channels != 3:
        raise UserError(f"{full_name!r} takes 3 channels, the images have {in_channels}: use a built-in or timm model")
    sets = models.get_model_weights(name)
    tag = pretrained if isinstance(pretrained, str) else "DEFAULT"
    if tag not in sets.__members__:
        raise UserError(f"model {full_name!r} has no weights {tag!r}; pretrained can be {', '.join(sets.__members__)}")
    weights = sets[tag]
    transforms, categories = weights.transforms(), tuple(weights.meta["categories"])
    normalization = Normalization(tuple(transforms.mean), tuple(transforms.std))
    heads = AUXILIARY.get(name, ())
    if heads and not args.get("transform_input"):
        # Their published weights expect other statistics, to which torchvision's networks convert inside. Stated
        # outside, they are saved with the weights.
        normalization = Normalization((0.5,) * 3, (0.5,) * 3)
    published = Published(normalization, transforms.crop_size[0], categories)
    arguments = dict(num_classes=num_classes, **({"transform_input": False} if heads else {}), **args)
    if pretrained:
        _require_classes(full_name, len(categories), num_classes)
    if pretrained and download:
        try:
            network = models.get_model(name, weights=weights, **arguments)
        except OSError as error:
            raise _not_downloaded(full_name, weights.url) from error
    else:
        network = models.get_model(name, **arguments)
    if heads and not args.get("aux_logits"):
        network.aux_logits = False
        for head in heads:
            setattr(network, head, None)
        return Built(network, published, heads)
    return Built(network, published)


def _build_timm(
    name: str, num_classes: int, in_channels: int, args: dict[str, Any], pretrained: bool | str, download: bool
) -> Built:
    import timm  # imported late because it takes seconds

    full_name = f"timm/{name}"
    if not timm.is_model(name):
        raise UnknownNameError(f"unknown timm model {name!r}{suggest(name, timm.list_models())}")
    arguments = dict(num_classes=num_classes, in_chans=in_channels, **args)
    config = timm.models.get_pretrained_cfg(name)
    published = None
    if config is not None:
        names = tuple(timm.data.ImageNetInfo().label_names()) if config.num_classes == IMAGENET else ()
        published = Published(Normalization(tuple(config.mean), tuple(config.std)), config.input_size[-1], names)
    if not pretrained:
        return Built(timm.create_model(name, **arguments), published)
    if config is None or not config.has_weights:
        raise UserError(f"model {full_name!r} has no published weights: set pretrained to false")
    _require_classes(full_name, config.num_classes, num_classes)
    try:
        return Built(timm.create_model(name, pretrained=download, **arguments), published)
    except OSError as error:
        hub = f"https://huggingface.co/{config.hf_hub_id}"
        raise _not_downloaded(full_name, hub if config.hf_hub_id else str(config.url)) from error


def _require_classes(name: str, published: int, num_classes: int) -> None:
    # Both libraries would otherwise add a random classifier without a message, or fail obscurely.
    if published != num_classes:
        raise UserError(
            f"the published weights of {name!r} have {published} classes, the data have {num_classes}: "
            "set pretrained to false, or give a checkpoint fine-tuned on these data"
        )


def _not_downloaded(name: str, url: str) -> UserError:
    return UserError(
        f"could not download the published weights of {name!r} from {url}: "
        "fetch the file elsewhere and set checkpoint to its local path (pretrained stays true)"
    )
