"""COCO annotation files: reading them through pycocotools, and checking them before any work is done."""

import contextlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO as CocoApi  # noqa: N811 (`COCO` is our DataModule)
from torch import Tensor

from vision_kd.data.base import missing_data

MOST_BAD_BOXES = 0.01  # COCO itself has a handful in a million; more means another box format
FEW_BAD_BOXES = 3  # a slip in a small set is no other format
MOST_BOXES_BEYOND = 0.1  # share of boxes that may end outside their image; corners taken for sizes mostly do
REQUIRED = {
    "images": ("id", "width", "height", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class Split:
    """The images of one split and their boxes.

    Attributes:
        api: pycocotools' view of the annotation file, against which detections are scored.
        folder: Where the image files are.
        image_ids: Ids of the images used, N.
        files: Their file names.
        sizes: Their width and height, (N, 2).
        boxes: All boxes as x1, y1, x2, y2 in pixels, without crowd regions, (B, 4).
        labels: Label of each box, 1 for the category with the lowest id, (B,).
        starts: Boxes of image n are those from ``starts[n]`` to ``starts[n + 1]``, (N + 1,).
        category_ids: Id of the category of labels 1, 2, ...
        class_names: Their names.
    """

    api: CocoApi
    folder: Path
    image_ids: list[int]
    files: list[str]
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    starts: Tensor
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def truth(self, row: int) -> tuple[Tensor, Tensor]:
        """Boxes (G, 4) and labels (G,) of an image."""
        here = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return self.boxes[here], self.labels[here]


def open_annotations(path: Path) -> CocoApi:
    """Pycocotools' view of an annotation file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, or not in COCO's instances format.
    """
    if not path.is_file():
        raise missing_data(
            "COCO annotations",
            [path],
            "COCO's annotations_trainval2017.zip, unpacked into data.root; data.train_annotations and "
            "data.val_annotations name other files",
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            api = CocoApi(str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a COCO annotation file ({type(error).__name__}: {error})") from error
    if missing := [
        key for key in ("images", "annotations", "categories") if not isinstance(api.dataset.get(key), list)
    ]:
        raise ValueError(f"{path} has no list of {', '.join(missing)}: it is not in COCO's instances format")
    complete_annotations(api, path)
    return api


def complete_annotations(api: CocoApi, path: Path) -> None:
    """Check the entries for what is needed, and add what follows from it: ``iscrowd`` and ``area``.

    Raises:
        ValueError: If an entry lacks a key, or the ids of annotations are not positive and distinct.
    """
    for kind, keys in REQUIRED.items():
        for place, entry in enumerate(api.dataset[kind]):
            if lacking := [key for key in keys if key not in entry]:
                raise ValueError(f"{path}: entry {place} of {kind} lacks {', '.join(lacking)}")
    ids = [annotation["id"] for annotation in api.dataset["annotations"]]
    # pycocotools takes a match with id 0 for none, and returns the last of several annotations with one id.
    if len(set(ids)) < len(ids) or min(ids, default=1) < 1:
        raise ValueError(f"{path}: the ids of annotations must be distinct and at least 1; number them anew")
    for annotation in api.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])


def categories(api: CocoApi, path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and names of the categories in the order of their ids, gaps left out.

    Raises:
        ValueError: If there is none, or two share an id or a name.
    """
    entries = sorted(api.dataset["categories"], key=lambda category: category["id"])
    ids, names = tuple(c["id"] for c in entries), tuple(c["name"] for c in entries)
    if not ids or len(set(ids)) < len(ids) or len(set(names)) < len(names):
        raise ValueError(f"{path} must name at least one category, each with an id and a name of its own, got {names}")
    return ids, names


def read_split(path: Path, folder: Path, *, train: bool) -> Split:
    """Images and boxes of a split. Training leaves out images without a box, which teach a detector little.

    Boxes are clipped to their image. Those without area inside it are left out of training with a warning; the
    scores are computed by pycocotools from the file as it is.

    Args:
        path: Annotation file.
        folder: Folder of the images.
        train: Whether the split is trained on.

    Raises:
        FileNotFoundError: If the file, the folder or an image is missing.
        ValueError: If an annotation refers to an unknown image or category, the boxes are in another format (more than
            1% without area inside their image, 10% beyond it, or all within one pixel), or no image is left.
    """
    api = open_annotations(path)
    ids, names = categories(api, path)
    label_of = {category: label for label, category in enumerate(ids, start=1)}
    kept: list[tuple[dict, list[list[float]], list[int]]] = []
    boxes_read, bad, beyond, extent = 0, [], [], 0.0
    unknown = [a["id"] for a in api.dataset["annotations"] if a["image_id"] not in api.imgs]
    strange = [a["id"] for a in api.dataset["annotations"] if a["category_id"] not in label_of]
    for what, listed in (("images", unknown), ("categories", strange)):
        if listed:
            raise ValueError(f"{path}: annotations {_first(listed)} refer to {what} that the file does not list")
    for image_id in sorted(api.imgs):
        image, boxes, labels = api.imgs[image_id], [], []
        for annotation in api.imgToAnns[image_id]:
            if annotation.get("iscrowd"):
                continue
            boxes_read += 1
            left, top, wide, high = annotation["bbox"]
            extent = max(extent, left + wide, top + high)
            if left + wide > image["width"] + 2 or top + high > image["height"] + 2:
                beyond.append(annotation["id"])
            box = clipped(annotation["bbox"], image["width"], image["height"])
            if box is None:
                bad.append(annotation["id"])
            else:
                boxes.append(box)
                labels.append(label_of[annotation["category_id"]])
        if boxes or not train:
            kept.append((image, boxes, labels))
    for what, found, most in (
        ("have no area inside their image", bad, max(FEW_BAD_BOXES, MOST_BAD_BOXES * boxes_read)),
        ("reach beyond their image", beyond, max(FEW_BAD_BOXES, MOST_BOXES_BEYOND * boxes_read)),
    ):
        if len(found) > most:
            raise ValueError(
                f"{path}: {len(found)} of {boxes_read} boxes {what} (annotations {_first(found)}); COCO boxes are "
                "[left, top, width, height] in pixels"
            )
    if boxes_read and extent <= 1:
        raise ValueError(
            f"{path}: no box reaches further than {extent:g} pixels; COCO boxes are [left, top, width, height] in "
            "pixels, not in shares of the image"
        )
    if not boxes_read and not train:
        raise ValueError(f"{path} holds no box to score against")
    if bad and train:
        warnings.warn(
            f"{path}: {len(bad)} of {boxes_read} boxes have no area inside their image and are left out of training "
            f"(annotations {_first(bad)})",
            stacklevel=2,
        )
    if not kept:
        raise ValueError(f"{path} lists no image{' with a box' if train else ''}")
    _require_files(folder, [image["file_name"] for image, _, _ in kept], path)
    counts = torch.tensor([0, *(len(labels) for _, _, labels in kept)])
    return Split(
        api=api,
        folder=folder,
        image_ids=[image["id"] for image, _, _ in kept],
        files=[image["file_name"] for image, _, _ in kept],
        sizes=torch.tensor([[image["width"], image["height"]] for image, _, _ in kept]),
        boxes=torch.tensor([box for _, boxes, _ in kept for box in boxes], dtype=torch.float32).view(-1, 4),
        labels=torch.tensor([label for _, _, labels in kept for label in labels], dtype=torch.int64),
        starts=counts.cumsum(0),
        category_ids=ids,
        class_names=names,
    )


def clipped(box: list[float], width: int, height: int) -> list[float] | None:
    """A box [left, top, width, height] as x1, y1, x2, y2 inside its image; None when nothing of it is left."""
    left, top, wide, high = box
    corners = np.clip([left, top, left + wide, top + high], 0, [width, height] * 2).tolist()
    return corners if corners[2] > corners[0] and corners[3] > corners[1] else None


def _require_files(folder: Path, files: list[str], path: Path) -> None:
    if not folder.is_dir():
        raise missing_data(
            "The folder of the images",
            [folder],
            f"the images that {path} lists, or data.train_images and data.val_images",
        )
    # One listing per folder: asking for each of COCO's 118,000 files takes minutes on a network drive.
    present = {
        parent: set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        for parent in {os.path.dirname(name) for name in files}
    }
    absent = [name for name in files if os.path.basename(name) not in present[os.path.dirname(name)]]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of {len(files)} images of {path} are not in {folder}: {_first(absent)}. Complete the "
            "folder, or take them out of the annotation file"
        )


def _first(items: list) -> str:
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
