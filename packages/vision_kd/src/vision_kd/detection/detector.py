"""Faster R-CNN with its input normalisation, split into the parts that distillation needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d

from kd_common.errors import UserError
from kd_common.functional.logits import at_least_fp32
from vision_kd.detection.sampling import SeededSampler
from vision_kd.models.normalized import NormalizedNetwork

Target = Mapping[str, Any]
"""Ground truth of an image: `boxes` (G, 4) as x1, y1, x2, y2 in pixels, `labels` (G,) in [1, C - 1], `seed`."""

UNUSED = "N/A"
"""Name of an output that no category uses; torchvision's 91 COCO outputs have ten of them."""


class WideRPNHead(RPNHead):
    """RPN head with outputs in at least float32, because bfloat16's 8 bits are too coarse for box coordinates."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the objectness and box deltas of every level."""
        logits, deltas = super().forward(x)
        return [at_least_fp32(level) for level in logits], [at_least_fp32(level) for level in deltas]


class WideAnchorGenerator(AnchorGenerator):
    """Anchors in at least float32 for any precision of the maps: bfloat16 has steps of 8 above 1,024."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of every image, (A, 4) as x1, y1, x2, y2 in pixels."""
        # Only sizes, precision and device of the maps are used.
        wide = [m.new_empty(m.shape[-2:], dtype=torch.promote_types(m.dtype, torch.float32)) for m in feature_maps]
        return super().forward(image_list, wide)


class WidePredictor(FastRCNNPredictor):
    """Predictor of the classes and boxes of a ROI in at least float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class logits and box deltas."""
        logits, deltas = super().forward(x)
        return at_least_fp32(logits), at_least_fp32(deltas)


@dataclass(frozen=True)
class TrainingPass:
    """Training outputs of a detector, attached to its graph where they are differentiable.

    Attributes:
        features: FPN maps by level, each (N, channels, h, w).
        proposals: The sampled proposals of every image, (R_n, 4) in pixels of the batch's images.
        image_sizes: Height and width of every image.
        labels: Class assigned to every proposal, (R,) with R the sum of R_n; 0 is background.
        class_logits: ROI head's class logits, (R, C).
        box_loss: ROI head's box regression loss, a scalar.
        rpn_losses: Objectness and box regression loss of the RPN, scalars.
    """

    features: dict[str, Tensor]
    proposals: list[Tensor]
    image_sizes: list[tuple[int, int]]
    labels: Tensor
    class_logits: Tensor
    box_loss: Tensor
    rpn_losses: dict[str, Tensor]


class Detector(NormalizedNetwork):
    """torchvision's Faster R-CNN with its normalisation and the names of its classes.

    Images keep their size: the DataModule scales them, so that teacher and student see the same pixels and can share
    proposals. In evaluation mode `forward` returns the detections of every image.

    Args:
        network: The network; its samplers and the precision of its outputs are replaced.
        class_names: Names of outputs 1 to C - 1 (output 0 is the background); `N/A` for unused ones.
        mean: Mean of each channel, for intensities in [0, 1].
        std: Standard deviation of each channel, positive.
    """

    format = "vision_kd.detector/1"
    network: FasterRCNN

    def __init__(
        self, network: FasterRCNN, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(network, mean, std)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names) + 1
        for part in (network.rpn, network.roi_heads):
            sampler = part.fg_bg_sampler
            part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)

    def metadata(self) -> dict[str, Any]:
        """Add the metadata of detection to those of `NormalizedNetwork`."""
        frozen = (module.eps for module in self.network.modules() if isinstance(module, FrozenBatchNorm2d))
        return super().metadata() | {"class_names": list(self.class_names), "batchnorm_eps": next(frozen, None)}

    def class_indices(self, class_names: Sequence[str]) -> list[int]:
        """Return the output indices of these classes in their order, after the background's.

        Raises:
            ValueError: If this detector does not know one of them.
        """
        known = {name: number for number, name in enumerate(self.class_names, start=1) if name != UNUSED}
        if missing := [name for name in class_names if name not in known]:
            raise UserError(
                f"the detector does not know {len(missing)} of the {len(class_names)} categories of the data: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} (it knows {', '.join(list(known)[:5])}"
                f"{', ...' if len(known) > 5 else ''}): take one trained on these categories"
            )
        return [0, *(known[name] for name in class_names)]

    def batch(self, images: Sequence[Tensor]) -> ImageList:
        """Return the normalised images, padded with zeros on the right and below to a common multiple of 32 pixels.

        Raises:
            ValueError: If an image is not floating point of shape (3, H, W).
        """
        for image in images:
            if not image.is_floating_point() or image.ndim != 3 or len(image) != self.in_channels:
                raise ValueError(
                    f"expected floating-point images ({self.in_channels}, H, W) in [0, 1], "
                    f"got {image.dtype} {tuple(image.shape)}"
                )
        padded = self.network.transform.batch_images([self.normalize(image) for image in images])
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageList(padded.contiguous(memory_format=torch.channels_last), sizes)

    def features(self, batch: ImageList) -> dict[str, Tensor]:
        """Return the FPN maps by level."""
        return self.network.backbone(batch.tensors)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the detections of every image, in evaluation mode.

        Args:
            images: Images in [0, 1], each (3, H, W).

        Returns:
            A dictionary per image: `boxes` (D, 4) as x1, y1, x2, y2 in pixels, `labels` (D,) in [1, C - 1] and `scores`
            (D,), the highest first.

        Raises:
            RuntimeError: In training mode, in which there is `training_pass`.
        """
        if self.training:
            raise RuntimeError("a Detector detects in evaluation mode: call .eval(), or training_pass(...) to train")
        batch = self.batch(images)
        features = self.features(batch)
        proposals, _ = self.network.rpn(batch, features)
        detections, _ = self.network.roi_heads(features, proposals, batch.image_sizes)
        return detections

    def training_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> TrainingPass:
        """Return one forward pass in training mode: sampled proposals, their class logits, and the other losses.

        Args:
            images: Images in [0, 1], each (3, H, W).
            targets: Ground truth of each image.
        """
        rpn, heads = self.network.rpn, self.network.roi_heads
        rpn.fg_bg_sampler.seeds = [target["seed"] for target in targets]
        heads.fg_bg_sampler.seeds = [target["seed"] + 1 for target in targets]
        batch = self.batch(images)
        features = self.features(batch)
        proposals, rpn_losses = rpn(batch, features, targets)
        proposals, _, labels, regression = heads.select_training_samples(proposals, targets)
        class_logits, deltas = heads.box_predictor(self._roi_features(features, proposals, batch.image_sizes))
        # The first value is the cross-entropy, which the method replaces.
        _, box_loss = fastrcnn_loss(class_logits.detach(), deltas, labels, regression)
        return TrainingPass(
            features=features,
            proposals=proposals,
            image_sizes=batch.image_sizes,
            labels=torch.cat(labels),
            class_logits=class_logits,
            box_loss=box_loss,
            rpn_losses=rpn_losses,
        )

    def classify(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Return the class logits (R, C) of given proposals, in at least float32; boxes are not computed."""
        return at_least_fp32(
            self.network.roi_heads.box_predictor.cls_score(self._roi_features(features, proposals, image_sizes))
        )

    def _roi_features(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        heads = self.network.roi_heads
        return heads.box_head(heads.box_roi_pool(features, proposals, image_sizes))
