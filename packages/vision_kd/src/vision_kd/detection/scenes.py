"""Embedded detection data: scikit-learn's digits on its photographs, in COCO's format."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision.ops import box_iou

from kd_common.files import locked
from vision_kd.data.base import stratified_order
from vision_kd.data.digits import TEST_IMAGES

IMAGES = {"train": 320, "val": 100}
LONG, SHORT = 320, 240
DIGIT_HEIGHTS = (32, 200)  # pixels, drawn log-uniformly: COCO's small, medium and large all occur
MOST_DIGITS = 5
EMPTY_SHARE = 0.05
MOST_OVERLAP = 0.05
INK = 0.25  # smallest opacity of a pixel inside the digit's box
TRAIN_SHARE = 2 / 3  # share of a photograph's width; the rest is for validation
QUALITY = 90


def build_scenes(folder: Path) -> None:
    """Write the training and the validation images and their annotations, unless they are there already.

    The layout is COCO's: `annotations/instances_{train,val}.json`, `train/` and `val/`. The same files are written
    every time. Training and validation share neither digits nor parts of a photograph. One process builds while the
    others wait.

    Args:
        folder: Where to write; it appears when it is complete.
    """
    if folder.is_dir():
        return
    with locked(folder, "the digit scenes", "KD_DATA"):
        if folder.is_dir():
            return
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            (partial / "annotations").mkdir()
            for number, (split, count) in enumerate(IMAGES.items()):
                (partial / split).mkdir()
                content = write_split(partial / split, split, count, np.random.default_rng(number))
                (partial / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_split(folder: Path, split: str, count: int, draw: np.random.Generator) -> dict:
    """Write the images of one split into a folder; return its annotations."""
    digits, photographs = load_digits(), load_sample_images().images
    order = stratified_order(torch.from_numpy(digits.target).long()).tolist()
    rows = order[TEST_IMAGES:] if split == "train" else order[:TEST_IMAGES]
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in range(1, count + 1):
        width, height = (LONG, SHORT) if draw.random() < 0.5 else (SHORT, LONG)
        canvas = background(photographs[draw.integers(len(photographs))], width, height, split == "train", draw)
        empty = draw.random() < EMPTY_SHARE
        placed = torch.zeros(0, 4)
        for row in [] if empty else draw.choice(rows, draw.integers(1, MOST_DIGITS + 1), replace=False):
            box = paste(canvas, digits.images[row] / 16, placed, draw)
            if box is None:
                continue
            placed = torch.cat([placed, box[None]])
            left, top, right, bottom = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(digits.target[row]) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
        name = f"{image_id:04}.jpg"
        Image.fromarray(canvas.round().astype(np.uint8)).save(folder / name, quality=QUALITY)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    names = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"images": images, "annotations": annotations, "categories": names}


def background(photograph: np.ndarray, width: int, height: int, train: bool, draw: np.random.Generator) -> np.ndarray:
    """Return a random crop of the split's part of a photograph, scaled to (height, width, 3), float."""
    border = round(photograph.shape[1] * TRAIN_SHARE)
    part = photograph[:, :border] if train else photograph[:, border:]
    largest = min(part.shape[1] / width, part.shape[0] / height)
    scale = largest * draw.uniform(0.5, 1.0)
    wide, high = int(width * scale), int(height * scale)
    left, top = draw.integers(part.shape[1] - wide + 1), draw.integers(part.shape[0] - high + 1)
    crop = Image.fromarray(part[top : top + high, left : left + wide])
    return np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def paste(canvas: np.ndarray, digit: np.ndarray, placed: Tensor, draw: np.random.Generator) -> Tensor | None:
    """Paint a digit at a place where it hardly covers others.

    Args:
        canvas: Image (height, width, 3), changed in place.
        digit: Opacity (8, 8) in [0, 1].
        placed: Boxes painted before, (P, 4).
        draw: Source of randomness.

    Returns:
        The box of the visible ink as x1, y1, x2, y2; None when no free place was found.
    """
    side = round(np.exp(draw.uniform(*np.log(DIGIT_HEIGHTS))))
    grey = Image.fromarray((255 * digit).astype(np.uint8))
    opacity = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    rows, columns = (np.flatnonzero((opacity > INK).any(axis=axis)) for axis in (1, 0))
    for _ in range(20):
        left, top = (int(draw.integers(size - side + 1)) for size in (canvas.shape[1], canvas.shape[0]))
        corners = [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
        box = torch.tensor(corners, dtype=torch.float32)
        if len(placed) == 0 or box_iou(box[None], placed).max() <= MOST_OVERLAP:
            break
    else:
        return None
    under = canvas[top : top + side, left : left + side]
    # The colour comes from the half of the range that the photograph does not use, so that the digit is visible.
    bright = under.mean() < 128
    colour = draw.uniform(160, 255, 3) if bright else draw.uniform(0, 95, 3)
    under += opacity[..., None] * (colour - under)
    return box
