"""Faster R-CNN with FPN on torchvision's backbones: construction, weights, student files."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from kd_common.checks import one_of, within
from kd_common.errors import UserError
from kd_common.registry import Registry
from vision_kd.detection.detector import Detector, WideAnchorGenerator, WidePredictor, WideRPNHead
from vision_kd.models import CheckpointError, ModelSpec
from vision_kd.models.checkpoints import Checkpoint, read_checkpoint
from vision_kd.models.classifier import choose_normalization
from vision_kd.models.normalized import Normalization
from vision_kd.models.weights import load_weights, rows

FPN_LEVELS = ("0", "1", "2", "3")
FPN_CHANNELS = 256
ASPECT_RATIOS = (0.5, 1.0, 2.0)
GROUPS = 16
OLD_RPN = re.compile(r"rpn\.head\.conv\.(weight|bias)$")
"""Module names in torchvision's published files, which are older than its code."""
CLASS_HEAD = "roi_heads.box_predictor.cls_score.weight"
COCO_OUTPUTS: list[str] = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
"""Names of torchvision's 91 outputs for COCO, the background first."""

TORCHVISION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Input normalisation with which torchvision trains its detectors."""

Norm = Literal["frozen", "group"]


@dataclass(frozen=True)
class Backbone:
    """Classifier whose stages feed a pyramid.

    Attributes:
        build: Makes the network, given `norm_layer`.
        stages: Names of the modules of the stem and the four stages; the last of each of the four feeds the FPN.
        channels: Channels of the four stages, at strides 4, 8, 16 and 32.
        published: torchvision's name of the classifier that has ImageNet weights, if any.
    """

    build: Callable[..., nn.Module]
    stages: tuple[tuple[str, ...], ...]
    channels: tuple[int, int, int, int]
    published: str | None = None


RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def _resnet(name: str, expansion: int) -> Backbone:
    channels = (64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion)
    return Backbone(partial(get_model, name), RESNET_STAGES, channels, name)


class NarrowResNet(ResNet):
    """ResNet of torchvision's basic blocks with a share of the channels, for small data."""

    def __init__(self, blocks: list[int], share: int, norm_layer: Callable[..., nn.Module]) -> None:
        self.share = share
        super().__init__(BasicBlock, blocks, norm_layer=norm_layer)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **settings: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // self.share, *arguments, **settings)


def _narrow(blocks: list[int], share: int) -> Backbone:
    channels = (64 // share, 128 // share, 256 // share, 512 // share)
    return Backbone(partial(NarrowResNet, blocks, share), RESNET_STAGES, channels)


def _mobilenet_v2(**arguments: Any) -> nn.Module:
    return get_model("mobilenet_v2", **arguments).features


BACKBONES: Registry[Backbone] = Registry("detector")
BACKBONES.register("fasterrcnn_resnet10_quarter_fpn")(_narrow([1, 1, 1, 1], share=4))
BACKBONES.register("fasterrcnn_resnet18_fpn")(_resnet("resnet18", 1))
BACKBONES.register("fasterrcnn_resnet50_fpn")(_resnet("resnet50", 4))
BACKBONES.register("fasterrcnn_resnet101_fpn")(_resnet("resnet101", 4))
# Each stage ends before the next halving of the resolution; the last 1x1 convolution is the classifier's.
BACKBONES.register("fasterrcnn_mobilenet_v2_fpn")(
    Backbone(
        _mobilenet_v2,
        (("0", "1"), ("2", "3"), ("4", "5", "6"), tuple(map(str, range(7, 14))), tuple(map(str, range(14, 18)))),
        (24, 32, 96, 320),
        "mobilenet_v2",
    )
)


def _group_norm(channels: int) -> nn.GroupNorm:
    """Return at most 16 groups, fewer where the channels do not divide into them."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def build_network(
    name: str,
    num_classes: int,
    *,
    norm: Norm = "frozen",
    backbone_weights: str | None = None,
    trainable_layers: int = 5,
    fpn_channels: int = FPN_CHANNELS,
    representation_size: int = 1024,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    **settings: Any,
) -> FasterRCNN:
    """Return Faster R-CNN with FPN levels p2 to p6.

    Args:
        name: Key of `BACKBONES`.
        num_classes: Number of outputs, the background among them.
        norm: `frozen` BatchNorm, for weights trained before, or `group` normalisation, to train from scratch.
        backbone_weights: ImageNet weights of the backbone: torchvision's name of a set, such as IMAGENET1K_V1, or a
            file in its layout.
        trainable_layers: Stages of the backbone that are trained, counted from the last; 5 trains the stem too.
        fpn_channels: Channels of every FPN level.
        representation_size: Width of the ROI head.
        anchor_sizes: Side of the anchors of the five levels, in pixels.
        settings: Further arguments of torchvision's FasterRCNN, such as `box_batch_size_per_image`.

    Raises:
        UnknownNameError: If no detector has this name.
        UserError: If a setting is unknown or out of range, or the backbone has no such weights, or if the published
            weights could not be downloaded.
        CheckpointError: If the weight file is damaged or does not fit.
    """
    backbone = BACKBONES.get(name)
    # FasterRCNN ignores unknown arguments.
    if unknown := sorted(settings.keys() - inspect.signature(FasterRCNN).parameters.keys()):
        raise UserError(f"detector {name!r} has no settings {unknown}")
    within("trainable_layers", trainable_layers, f"[0, {len(backbone.stages)}]")
    layers = {"frozen": FrozenBatchNorm2d, "group": _group_norm}
    one_of("norm", norm, layers)
    levels = {stage[-1]: level for stage, level in zip(backbone.stages[1:], FPN_LEVELS, strict=True)}
    classifier = backbone.build(norm_layer=layers[norm])
    pyramid = BackboneWithFPN(classifier, levels, list(backbone.channels), fpn_channels)
    if backbone_weights is not None:
        _load_backbone(pyramid.body, backbone, name, backbone_weights)
    for stage in backbone.stages[: len(backbone.stages) - trainable_layers]:
        for module in stage:
            pyramid.body.get_submodule(module).requires_grad_(False)
    anchors = WideAnchorGenerator(tuple((size,) for size in anchor_sizes), (ASPECT_RATIOS,) * len(anchor_sizes))
    if len(anchor_sizes) != len(FPN_LEVELS) + 1:
        raise UserError(f"anchor_sizes needs one size for each of the {len(FPN_LEVELS) + 1} levels, got {anchor_sizes}")
    pool = MultiScaleRoIAlign(list(FPN_LEVELS), output_size=7, sampling_ratio=2)
    return FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_head=WideRPNHead(fpn_channels, len(ASPECT_RATIOS)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(fpn_channels * pool.output_size[0] ** 2, representation_size),
        box_predictor=WidePredictor(representation_size, num_classes),
        **settings,
    )


def build_detector(
    spec: ModelSpec, *, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Detector:
    """Build a detector, load its weights and attach the normalisation and classes that belong to them.

    They come from the published weights (`pretrained`: torchvision's ResNet-50 on COCO), from the student file
    (`checkpoint` written by `save_student`), or from any other file with torchvision's 91 outputs. Without such weights
    the given ones are used.

    Args:
        spec: Network and weights; `args` as in `build_network`.
        class_names: Categories of the data, in the order of their labels.
        mean: Mean of each channel of the data, for intensities in [0, 1].
        std: Standard deviation of each channel of the data.

    Raises:
        UserError, UnknownNameError, CheckpointError: As in `build_network`.
    """
    published = None
    if spec.pretrained:
        published = _published_detector(spec)
        class_names = published.meta["categories"][1:]
    checkpoint = _read(spec.checkpoint) if spec.checkpoint is not None else None
    if checkpoint is not None and checkpoint.class_names:
        class_names = checkpoint.class_names
    elif checkpoint is not None and rows(checkpoint, CLASS_HEAD) == len(COCO_OUTPUTS) > len(class_names) + 1:
        class_names = COCO_OUTPUTS[1:]
    args = dict(spec.args)
    if published is not None or checkpoint is not None:
        args.pop("backbone_weights", None)  # overwritten anyway
    try:
        network = build_network(spec.name, len(class_names) + 1, **args)
    except TypeError as error:
        raise UserError(f"detector {spec.name!r} rejects args {spec.args}: {error}") from error
    if checkpoint is not None:
        load_weights(network, checkpoint, model=spec.name, num_classes=len(class_names) + 1, entry=spec.entry)
    elif published is not None:
        network.load_state_dict(_download(published, "checkpoint (pretrained stays true)"))
    if published is not None:
        overwrite_eps(network, 0.0)  # these weights were trained before torchvision added epsilon to the variance
    if checkpoint is not None and (eps := checkpoint.meta.get("batchnorm_eps")) is not None:
        overwrite_eps(network, eps)
    data = Normalization(tuple(mean), tuple(std))
    return Detector(
        network, class_names, *choose_normalization(spec, checkpoint, Detector.format, TORCHVISION, data, usual=True)
    )


def load_detector(path: str | Path) -> Detector:
    """Rebuild a detector, in evaluation mode, from a file that `save_student` wrote.

    Raises:
        CheckpointError: If the file was not written by `save_student` from a detector.
    """
    meta = read_checkpoint(path).meta
    if meta.get("format") != Detector.format:
        raise CheckpointError(
            f"{path} does not describe a detector (format {meta.get('format')!r}, expected {Detector.format!r}): name "
            "the network with build_detector(ModelSpec(name, checkpoint=...), ...)"
        )
    names = ("class_names", "mean", "std")
    if missing := [key for key in ("name", "args", *names) if key not in meta]:
        raise CheckpointError(f"{path} does not describe its detector: it lacks {', '.join(missing)}; write it again")
    spec = ModelSpec(meta["name"], meta["args"], checkpoint=str(path))
    return build_detector(spec, **{key: meta[key] for key in names}).eval()


def _load_backbone(body: nn.Module, backbone: Backbone, name: str, weights: str) -> None:
    """Load ImageNet weights by the name of torchvision's set or from a file; the classifier's own layers are left."""
    if Path(weights).is_file():
        checkpoint = read_checkpoint(weights)
    else:
        sets = get_model_weights(backbone.published).__members__ if backbone.published else {}
        if weights not in sets:
            raise UserError(
                f"backbone_weights of {name!r} is neither a file nor one of {', '.join(sets) or '(none published)'}, "
                f"got {weights!r}"
            )
        checkpoint = Checkpoint(Path(sets[weights].url), {"": _download(sets[weights], "backbone_weights")}, {})
    used = {module for stage in backbone.stages for module in stage}

    def surplus(name: str) -> bool:
        """Return the layers of the classifier that feed no level, and the counters that frozen BatchNorm lacks."""
        return name.split(".")[0] not in used or name.endswith("num_batches_tracked")

    load_weights(body, checkpoint, model=f"the backbone of {name}", surplus=surplus)


def _read(path: str) -> Checkpoint:
    """Return a checkpoint in torchvision's layout, current or old.

    Raises:
        CheckpointError: For detectron2's networks, which compute another function than torchvision's.
    """
    hint = (
        f"{path} is a detectron2 checkpoint. Its networks stride in the 1x1 convolutions, read BGR images in [0, 255] "
        "and align ROI pooling and anchors differently, so that its weights do not give the same detector here: take "
        "weights in torchvision's layout, or leave checkpoint out to have the detector trained"
    )
    if Path(path).suffix == ".pkl":
        raise CheckpointError(hint)
    checkpoint = read_checkpoint(path)
    if any(
        "backbone.bottom_up." in key or "proposal_generator." in key for s in checkpoint.states.values() for key in s
    ):
        raise CheckpointError(hint)
    states = {
        entry: {OLD_RPN.sub(r"rpn.head.conv.0.0.\1", key): tensor for key, tensor in state.items()}
        for entry, state in checkpoint.states.items()
    }
    return checkpoint._replace(states=states)


def _published_detector(spec: ModelSpec) -> WeightsEnum:
    if spec.name != "fasterrcnn_resnet50_fpn":
        raise UserError(
            f"torchvision publishes no COCO weights of {spec.name!r}, only of fasterrcnn_resnet50_fpn: set pretrained "
            "to false, and checkpoint to a weight file or let the detector be trained"
        )
    tag = "DEFAULT" if spec.pretrained is True else str(spec.pretrained)
    sets = FasterRCNN_ResNet50_FPN_Weights.__members__
    if tag not in sets:
        raise UserError(f"model {spec.name!r} has no weights {tag!r}; pretrained can be {', '.join(sets)}")
    return sets[tag]


def _download(weights: WeightsEnum, setting: str) -> dict[str, Any]:
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise UserError(
            f"could not download the published weights from {weights.url}: fetch the file elsewhere and give its local "
            f"path as {setting}"
        ) from error
