"""COCO annotation files: reading and checks before any work is done, and pycocotools' view of them."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from pycocotools.coco import COCO as CocoApi  # noqa: N811 (`COCO` is our DataModule)
from torch import Tensor

from kd_common.errors import UserError
from vision_kd.data.base import missing_data
from vision_kd.data.image_files import header_size, read_rgb, spread
from vision_kd.detection.detector import UNUSED
from vision_kd.detection.entries import FIELDS, read_entries

MOST_BAD_BOXES = 0.01  # COCO itself has a handful in a million; more means another box format
FEW_BAD_BOXES = 3  # a slip in a small set does not mean another format
MOST_BOXES_BEYOND = 0.1  # share of boxes that may end outside their image; corners mistaken for sizes mostly do


@dataclass(frozen=True)
class Split:
    """Images of one split and their boxes.

    Attributes:
        api: pycocotools' view of the annotation file, against which detections are scored.
        folder: Where the image files are.
        image_ids: Ids of the images used, N.
        files: File names of the images.
        sizes: Width and height of the images, (N, 2).
        boxes: All boxes as x1, y1, x2, y2 in pixels, without crowd regions, (B, 4).
        labels: Label of each box, 1 for the category with the lowest id, (B,).
        starts: Boxes of image n are those from `starts[n]` to `starts[n + 1]`, (N + 1,).
        category_ids: Id of the category of labels 1, 2, ...
        class_names: Names of the categories.
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
        """Return the boxes (G, 4) and labels (G,) of an image."""
        here = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return self.boxes[here], self.labels[here]


def open_annotations(path: Path) -> CocoApi:
    """Return the pycocotools' view of an annotation file, every value of which has the type that it should have.

    Raises:
        UserError: If there is no such file, or if it is no JSON, or not in COCO's instances format; the message names
            the entry.
    """
    if not path.is_file():
        raise missing_data(
            "COCO annotations",
            [path],
            "COCO's annotations_trainval2017.zip, unpacked into data.root; data.train_annotations and "
            "data.val_annotations name other files",
        )
    try:
        content = json.loads(path.read_bytes())  # from bytes, whatever Unicode encoding and byte order mark they have
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a COCO annotation file ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a COCO annotation file: it holds a {type(content).__name__}, no object")
    if missing := [kind for kind in FIELDS if not isinstance(content.get(kind), list)]:
        raise UserError(f"{path} has no list of {', '.join(missing)}: it is not in COCO's instances format")
    for kind in FIELDS:
        read_entries(content[kind], kind, path)
    for annotation in content["annotations"]:
        if annotation["area"] is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    names = [{"id": os.path.normpath(image["file_name"])} for image in content["images"]]
    for kind, entries in (
        ("ids of images", content["images"]),
        ("ids of annotations", content["annotations"]),
        ("file names", names),
    ):
        if doubled := repeated([entry["id"] for entry in entries]):
            raise UserError(f"{path}: {kind} must be distinct, got {_first(doubled)} more than once")
    api = CocoApi()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def repeated(values: Sequence[Any]) -> list[Any]:
    """Return the values that occur more than once, in the order of their second occurrences."""
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def categories(api: CocoApi, path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids and names of the categories in the order of their ids, gaps left out.

    Raises:
        UserError: If there is none, if two share an id or a name, or if one is called as unused outputs are.
    """
    entries = sorted(api.dataset["categories"], key=lambda category: category["id"])
    ids, names = tuple(c["id"] for c in entries), tuple(c["name"] for c in entries)
    if not ids or repeated(ids) or repeated(names):
        raise UserError(f"{path} must name at least one category, each with an id and a name of its own, got {names}")
    if UNUSED in names:
        raise UserError(f"{path}: a category is named {UNUSED}, as outputs without a category are: rename it")
    return ids, names


def read_split(path: Path, folder: Path, *, train: bool) -> Split:
    """Return the images and boxes of a split. Training leaves out images without a box, which teach a detector little.

    Boxes are clipped to their image. Boxes without area inside it are left out of training with a warning. pycocotools
    computes the scores from the unchanged file. The headers of some images are read, to compare sizes.

    Args:
        path: Annotation file.
        folder: Folder of the images.
        train: Whether the split is trained on.

    Raises:
        UserError: If the file, the folder or an image is missing, or if an annotation refers to an unknown image or
            category, no image is left, or the boxes are in another format: more than 1% without area inside their
            image, 10% beyond it, or all within one pixel.
    """
    api = open_annotations(path)
    ids, names = categories(api, path)
    label_of = {category: label for label, category in enumerate(ids, start=1)}
    for key, known, what in (("image_id", api.imgs, "images"), ("category_id", label_of, "categories")):
        if unknown := [a["id"] for a in api.dataset["annotations"] if a[key] not in known]:
            raise UserError(f"{path}: annotations {_first(unknown)} refer to {what} that the file does not list")
    images = [api.imgs[image_id] for image_id in sorted(api.imgs)]
    row_of = {image["id"]: row for row, image in enumerate(images)}
    objects = [a for image in images for a in api.imgToAnns.get(image["id"], ()) if not a["iscrowd"]]
    rows = np.array([row_of[a["image_id"]] for a in objects], dtype=np.int64)
    sizes = np.array([[image["width"], image["height"]] for image in images], dtype=np.float64).reshape(-1, 2)
    corners = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    boxes = clipped(corners, sizes[rows])
    whole = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1))
    check_boxes(path, corners, sizes[rows], whole, np.array([a["id"] for a in objects]), train=train)
    counts = np.bincount(rows[whole], minlength=len(images))
    used = (counts > 0) | (not train)
    if not used.any():
        raise UserError(f"{path} lists no image{' with a box' if train else ''}")
    if not used.all():
        rank_zero_info(f"{path}: {(~used).sum():,} of {len(used):,} images have no box and are not trained on")
    images = [image for image, use in zip(images, used, strict=True) if use]
    split = Split(
        api=api,
        folder=folder,
        image_ids=[image["id"] for image in images],
        files=[image["file_name"] for image in images],
        sizes=torch.tensor([[image["width"], image["height"]] for image in images]),
        boxes=torch.from_numpy(boxes[whole]),
        labels=torch.tensor([label_of[a["category_id"]] for a in objects], dtype=torch.int64)[torch.from_numpy(whole)],
        starts=torch.from_numpy(np.concatenate([[0], counts[used].cumsum()])),
        category_ids=ids,
        class_names=names,
    )
    _require_files(folder, split.files, path)
    for row in spread(len(split)):
        if header_size(folder / split.files[row]) != tuple(split.sizes[row].tolist()):
            read_image(split, row)  # the header alone may not show the orientation
    return split


def clipped(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the boxes x1, y1, x2, y2 cut off at the borders of images of width and height, (B, 4), float32."""
    return np.clip(corners, 0, sizes[:, [0, 1, 0, 1]]).astype(np.float32)


def check_boxes(
    path: Path, corners: np.ndarray, sizes: np.ndarray, whole: np.ndarray, ids: np.ndarray, *, train: bool
) -> None:
    """Raise for boxes in another format, and warn of single ones that no detector can find.

    Args:
        path: Annotation file.
        corners: Boxes x1, y1, x2, y2 as the file has them, (B, 4).
        sizes: Width and height of their images, (B, 2).
        whole: Whether part of each box lies inside the image, (B,).
        ids: Of their annotations, (B,).
        train: Whether they are trained on.

    Raises:
        UserError: If there are more such boxes than slips explain, or none at all to score against.
    """
    beyond = ((corners[:, 2:] > sizes + 2) | (corners[:, :2] < -2)).any(1)
    bad = ids[~whole].tolist()
    for what, found, most in (
        ("have no area inside their image", bad, max(FEW_BAD_BOXES, MOST_BAD_BOXES * len(ids))),
        ("reach beyond their image", ids[beyond].tolist(), max(FEW_BAD_BOXES, MOST_BOXES_BEYOND * len(ids))),
    ):
        if len(found) > most:
            raise UserError(
                f"{path}: {len(found)} of {len(ids)} boxes {what} (annotations {_first(found)}); COCO boxes are "
                "[left, top, width, height] in pixels"
            )
    if len(ids) and corners.max() <= 1:
        raise UserError(
            f"{path}: no box reaches further than {corners.max():g} pixels; COCO boxes are [left, top, width, height] "
            "in pixels, not in shares of the image"
        )
    if not len(ids) and not train:
        raise UserError(f"{path} holds no box to score against")
    if bad:
        warnings.warn(
            f"{path}: {len(bad)} of {len(ids)} boxes have no area inside their image and "
            f"{'are left out of training' if train else 'count as missed by every detector'} "
            f"(annotations {_first(bad)})",
            stacklevel=3,
        )


def read_image(split: Split, row: int) -> Tensor:
    """Return the upright image of a row, (3, H, W), uint8.

    Raises:
        UserError: If it has another size than the annotations say, or cannot be read.
    """
    path, annotated = split.folder / split.files[row], split.sizes[row].tolist()
    image = read_rgb(path)
    if (found := list(image.shape[:0:-1])) != annotated:
        hint = ". Its EXIF orientation may turn it: annotate it as viewers show it, or remove the orientation"
        raise UserError(
            f"{path} is {found[0]} x {found[1]} pixels, its annotations say {annotated[0]} x {annotated[1]}: the boxes "
            f"would not fit{hint if found == annotated[::-1] else ''}"
        )
    return image


def _require_files(folder: Path, files: list[str], path: Path) -> None:
    if not folder.is_dir():
        raise missing_data(
            "The folder of the images",
            [folder],
            f"the images that {path} lists, or data.train_images and data.val_images",
        )
    # One listing per folder suffices; a query for each of COCO's 118,000 files takes minutes on a network drive.
    present = {parent: _file_names(folder / parent) for parent in {os.path.dirname(name) for name in files}}
    absent = [name for name in files if os.path.basename(name) not in present[os.path.dirname(name)]]
    if absent:
        hint = " (write / between folders, not \\)" if "\\" in absent[0] else ""
        raise UserError(
            f"{len(absent)} of {len(files)} images of {path} are not in {folder}: {_first(absent)}{hint}. Complete the "
            "folder, or take them out of the annotation file"
        )


def _file_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _first(items: list) -> str:
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
