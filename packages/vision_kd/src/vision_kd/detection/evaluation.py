"""COCO average precision of detections, computed by pycocotools from the detections of all ranks."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO as CocoApi  # noqa: N811 (`COCO` is our DataModule)
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from kd_common.distributed import gather_rows
from kd_common.files import write_atomically
from vision_kd.detection.coco import Split
from vision_kd.detection.data import COCO
from vision_kd.detection.detector import Detector

METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
"""Our names of pycocotools' statistics: AP over IoU 0.50 to 0.95, at 0.50, at 0.75; of small, medium, large boxes."""

COLUMNS = 7  # image id, left, top, width, height, score, category id


class DetectionRecord:
    """Detections of a pass over the validation images, in the images' original pixels and COCO's category ids.

    Args:
        split: Images and their annotations.
        class_names: Names of the detector's outputs from 1 on; detections of names the data do not have are dropped.
    """

    def __init__(self, split: Split, class_names: Sequence[str]) -> None:
        self.split = split
        ids = dict(zip(split.class_names, split.category_ids, strict=True))
        self._known = torch.tensor([False, *(name in ids for name in class_names)])
        self._category = torch.tensor([0, *(ids.get(name, 0) for name in class_names)], dtype=torch.float64)
        self._seen: list[int] = []
        self._rows: list[Tensor] = []

    def update(self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the detections of a batch of scaled images.

        Args:
            detections: Per image boxes, labels and scores as `Detector` returns them.
            targets: Per image `image_id` and `ratio`.
        """
        for found, target in zip(detections, targets, strict=True):
            boxes = found["boxes"].detach().cpu().double() / target["ratio"].cpu()
            corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
            labels = found["labels"].cpu()
            rest = [found["scores"].cpu().double(), self._category[labels]]
            image = torch.full((len(boxes), 1), target["image_id"], dtype=torch.float64)
            rows = torch.cat([image, corner, size, torch.stack(rest, dim=1)], dim=1)
            self._rows.append(rows[self._known[labels]])
            self._seen.append(target["image_id"])

    def gather(self, device: torch.device | str = "cpu") -> tuple[Tensor, list[int]]:
        """Return the detections (D, 7) of all ranks in the order of the image ids, and the ids of all images seen.

        A row holds image id, left, top, width, height, score and category id.

        Raises:
            RuntimeError: If an image was seen twice, which would count its boxes twice.
        """
        rows = gather_rows(torch.cat([torch.zeros(0, COLUMNS, dtype=torch.float64), *self._rows]).to(device)).cpu()
        seen = gather_rows(torch.tensor(self._seen, dtype=torch.int64, device=device)).tolist()
        if len(set(seen)) < len(seen):
            raise RuntimeError(f"{len(seen) - len(set(seen))} validation images were seen more than once")
        return rows[rows[:, 0].argsort(stable=True)], sorted(seen)


def average_precision(split: Split, rows: Tensor, image_ids: Sequence[int]) -> dict[str, float]:
    """Return COCO's AP, AP50, AP75, APs, APm and APl in [0, 1], as pycocotools computes them.

    Args:
        split: The ground truth.
        rows: Detections (D, 7) as `DetectionRecord.gather` returns them; at most 100 an image count.
        image_ids: Images to score.

    Returns:
        The metrics; a metric of a size of which the images have no box is left out.
    """
    results = CocoApi()
    results.dataset = split.api.dataset | {"annotations": _annotations(rows)}
    with contextlib.redirect_stdout(io.StringIO()):
        results.createIndex()
        evaluation = COCOeval(split.api, results, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = {name: float(evaluation.stats[place]) for name, place in METRICS.items()}
    return {name: value for name, value in values.items() if value >= 0}


def _annotations(rows: Tensor) -> list[dict[str, Any]]:
    """Return the detections as pycocotools' `loadRes` enters them, which takes no empty list."""
    return [
        {
            "id": number,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for number, (image, *box, score, category) in enumerate(rows.tolist(), start=1)
    ]


def evaluate_detector(detector: Detector, data: COCO, device: torch.device | str = "cpu") -> DetectionRecord:
    """Return the detections of the validation images, in this process alone.

    Args:
        detector: Put in evaluation mode.
        data: The images.
        device: Where to run.

    Raises:
        ValueError: If the detector does not know a category of the data.
    """
    detector.class_indices(data.class_names)
    detector.eval().to(device)  # outside inference mode, which would leave weights that cannot be trained
    record = DetectionRecord(data.split("val"), detector.class_names)
    with torch.inference_mode():
        for images, targets in data.val_dataloader():
            record.update(detector([image.to(device).float() / 255 for image in images]), targets)
    return record


def write_results(path: Path, rows: Tensor) -> None:
    """Write detections as COCO result JSON, which pycocotools and COCO's evaluation server read.

    Args:
        path: The file.
        rows: Detections (D, 7) as `DetectionRecord.gather` returns them.
    """
    results = [
        {"image_id": int(image), "category_id": int(category), "bbox": [round(x, 2) for x in box], "score": score}
        for image, *box, score, category in rows.tolist()
    ]
    write_atomically(path, json.dumps(results))
