"""Image classifiers: the CIFAR networks of the distillation literature, and any timm or torchvision model."""

from vision_kd.models import mobilenet, resnet, shufflenet, vgg, wide_resnet  # noqa: F401 (they fill MODELS)
from vision_kd.models.checkpoints import CheckpointError
from vision_kd.models.classifier import (
    Classifier,
    ModelSpec,
    build_classifier,
)
from vision_kd.models.normalized import NormalizedNetwork
from vision_kd.models.registry import MODELS
from vision_kd.models.student import export, load_classifier, save_student

__all__ = [
    "MODELS",
    "CheckpointError",
    "Classifier",
    "ModelSpec",
    "NormalizedNetwork",
    "build_classifier",
    "export",
    "load_classifier",
    "save_student",
]
