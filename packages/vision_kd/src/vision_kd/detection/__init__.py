"""Object detectors: Faster R-CNN with FPN, COCO data and scores, distillation through the ROI heads."""

from vision_kd.detection.data import COCO, DigitScenes
from vision_kd.detection.detector import Detector
from vision_kd.detection.distillation import DetectionModule, FeatureDistillation
from vision_kd.detection.evaluation import DetectionRecord, average_precision, evaluate_detector, write_results
from vision_kd.detection.step import detection_step
from vision_kd.detection.zoo import BACKBONES, build_detector, load_detector

__all__ = [
    "BACKBONES",
    "COCO",
    "DetectionModule",
    "DetectionRecord",
    "Detector",
    "DigitScenes",
    "FeatureDistillation",
    "average_precision",
    "build_detector",
    "detection_step",
    "evaluate_detector",
    "load_detector",
    "write_results",
]
