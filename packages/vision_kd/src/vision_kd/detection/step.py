"""One distillation step of a detector: from images and boxes to component gradients.

    images -> student -> its sampled proposals -> ROI heads of student and teacher -> class logits -> method
                      -> box and RPN losses, which join the task component
                      -> FPN maps -> fusion -> distance to the teacher's, a component of its own

The method is one of `vision_kd.methods`, applied to proposals instead of images. The target of a proposal is its
assigned class.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vision_kd.detection.detector import Detector, Target
from vision_kd.detection.review import ReviewFusion, review_distance
from vision_kd.methods import Method
from vision_kd.training.step import StepOutput, component_step

CLASSES, REST, FEATURE = "classes", "rest", "feature"


def detection_step(
    student: Detector,
    teacher: Detector | None,
    method: Method,
    images: Sequence[Tensor],
    targets: Sequence[Target],
    params: Sequence[nn.Parameter],
    *,
    class_indices: Sequence[int] = (),
    fusion: ReviewFusion | None = None,
    feature_weight: float = 0.0,
    buckets: Mapping[str, tuple[str, ...]] | None = None,
    epoch: float = 0.0,
    k: int | None = None,
) -> StepOutput:
    """Run student and teacher on one batch and differentiate every component.

    Each ROI head runs once, on the proposals that the student sampled. Both networks see the same images and apply
    their own normalisation.

    Args:
        student: Detector to train, in training mode.
        teacher: Frozen detector in evaluation mode, or None for methods without one.
        method: Loss on class logits, of a single view.
        images: Images in [0, 1], each (3, H, W).
        targets: Ground truth of each image.
        params: Parameters to differentiate, in the optimizer's order.
        class_indices: The teacher's outputs in the order of the student's, see `Detector.class_indices`. They leave
            outputs of unused categories out of both softmaxes and of the mask.
        fusion: Makes maps of the student comparable with the teacher's; None distils no features.
        feature_weight: Weight of their distance.
        buckets: As in `vision_kd.training.step.component_step`.
        epoch: Progress in epochs, for losses that warm up.
        k: Surviving classes of the dynamic top-k mask.
    """
    # As in classification the teacher's backbone runs first, so that the student's activations are still in the cache.
    teacher_maps: dict[str, Tensor] = {}
    if teacher is not None:
        with torch.no_grad():
            teacher_maps = teacher.features(teacher.batch(images))
    own = student.training_pass(images, targets)
    soft: dict[str, Tensor] = {}
    if teacher is not None and method.needs_teacher:
        with torch.no_grad():
            logits = teacher.classify(teacher_maps, own.proposals, own.image_sizes)
            soft = {view: logits[:, list(class_indices)] for view in method.views}

    # The other losses enter as one output with gradient 1, because they take no part in the decomposition.
    outputs = {CLASSES: own.class_logits, REST: own.box_loss + sum(own.rpn_losses.values())}
    if fusion is not None:
        names = list(teacher_maps)
        fused = fusion([own.features[name] for name in names])
        outputs |= {f"{FEATURE} {name}": level for name, level in zip(names, fused, strict=True)}

    def losses(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = method(dict.fromkeys(method.views, leaves[CLASSES]), soft, own.labels, epoch=epoch, k=k)
        parts["task"] = parts["task"] + leaves[REST]
        if fusion is not None:
            maps = {name: leaves[f"{FEATURE} {name}"] for name in teacher_maps}
            parts[FEATURE] = feature_weight * review_distance(maps, teacher_maps)
        return parts

    return component_step(outputs, losses, params, buckets=buckets)
