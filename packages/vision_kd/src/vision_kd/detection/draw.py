"""Pictures of detections next to the ground truth."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from vision_kd.detection.coco import Split, read_image


def draw_detections(
    path: Path, split: Split, rows: Tensor, image_ids: Sequence[int], *, threshold: float = 0.5
) -> None:
    """Save a figure with a line for each image: the ground truth on the left, the detections on the right.

    Args:
        path: The figure's file.
        split: Images and ground truth.
        rows: Detections (D, 7) as `DetectionRecord.gather` returns them.
        image_ids: Images to draw.
        threshold: Lowest score drawn, in [0, 1].
    """
    names = dict(zip(split.category_ids, split.class_names, strict=True))
    figure = Figure(figsize=(9, 3.6 * len(image_ids)), layout="constrained")
    for line, image_id in zip(figure.subplots(len(image_ids), 2, squeeze=False), image_ids, strict=True):
        row = split.image_ids.index(image_id)
        pixels = read_image(split, row).permute(1, 2, 0).numpy()
        boxes, labels = split.truth(row)
        truth = [
            (box.tolist(), split.class_names[label - 1], label)
            for box, label in zip(boxes, labels.tolist(), strict=True)
        ]
        found = rows[(rows[:, 0] == image_id) & (rows[:, 5] >= threshold)].tolist()
        detected = [
            ([x, y, x + w, y + h], f"{names[int(c)]} {score:.2f}", split.category_ids.index(int(c)) + 1)
            for _, x, y, w, h, score, c in found
        ]
        for axes, title, drawn in zip(line, ("ground truth", "detected"), (truth, detected), strict=True):
            axes.imshow(pixels)
            axes.set_title(f"{title}, image {image_id}", fontsize=9)
            axes.set_axis_off()
            for box, text, label in drawn:
                _draw_box(axes, box, text, label)
    figure.savefig(path, dpi=100)


def _draw_box(axes: Axes, box: Sequence[float], text: str, label: int) -> None:
    colour = colormaps["tab20"](label % 20)
    axes.add_patch(Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], fill=False, color=colour, lw=2))
    label_box = {"color": colour, "pad": 0.5}
    axes.text(box[0], box[1], text, fontsize=8, color="white", va="bottom", bbox=label_box, parse_math=False)
