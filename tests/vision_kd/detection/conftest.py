"""Tiny detectors, images and folders in COCO's format; the embedded scenes are built once for all tests."""

import json

import pytest
import torch
from PIL import Image

from vision_kd.detection import build_detector
from vision_kd.detection.scenes import build_scenes
from vision_kd.models import ModelSpec

MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.375)  # exact in float32, in which they are stored
SMALL = {
    "norm": "group",
    "fpn_channels": 16,
    "representation_size": 32,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rpn_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 60,
    "rpn_post_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_test": 40,
    "box_batch_size_per_image": 16,
}


class Tools:
    """What the detection tests share; every method is a plain function of its arguments."""

    name = "fasterrcnn_resnet10_quarter_fpn"
    args = SMALL

    @staticmethod
    def detector(names="abc", seed=0, dtype=torch.float64, mean=MEAN, std=STD, **args):
        torch.manual_seed(seed)
        spec = ModelSpec(Tools.name, SMALL | args)
        detector = build_detector(spec, class_names=list(names), mean=mean, std=std).to(dtype)
        # The initial heads are almost uniform; a test should see classes that differ.
        torch.nn.init.normal_(detector.network.roi_heads.box_predictor.cls_score.weight, std=0.5)
        return detector

    @staticmethod
    def teacher(names="abc", seed=1, **args):
        return Tools.detector(names, seed, **args).eval().requires_grad_(False)

    @staticmethod
    def batch(dtype=torch.float64, seed=5):
        """Three images, the last without a box."""
        generator = torch.Generator().manual_seed(seed)
        images = [torch.rand(3, *size, generator=generator, dtype=dtype) for size in ((64, 64), (64, 85), (48, 64))]
        boxes = [[[4, 6, 30, 40], [35, 10, 60, 33]], [[20, 20, 70, 60]], []]
        targets = [
            {
                "boxes": torch.tensor(found, dtype=dtype).view(-1, 4),
                "labels": torch.arange(1, len(found) + 1),
                "seed": 10 * n,
            }
            for n, found in enumerate(boxes)
        ]
        return images, targets

    @staticmethod
    def write_coco(root, annotations, *, split="val2017", sizes=((40, 30), (30, 40), (40, 40)), ids=(3, 7, 9), **extra):
        """Random images ``1.png`` ... of (width, height) pixels and an annotation file; categories 3, 7 and 9."""
        generator = torch.Generator().manual_seed(0)
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = []
        for number, (width, height) in enumerate(sizes, start=1):
            pixels = torch.randint(256, (height, width, 3), generator=generator).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / split / f"{number}.png")
            images.append({"id": 10 * number, "file_name": f"{number}.png", "width": width, "height": height})
        entries = [
            {"id": n, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry}
            for n, entry in enumerate(annotations, start=1)
        ]
        content = {
            "images": images,
            "annotations": entries,
            "categories": [{"id": i, "name": f"c{i}"} for i in ids],
        } | extra
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
        return path


@pytest.fixture
def tools():
    return Tools


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kd_data")
    build_scenes(folder / "digit_scenes_1")
    return folder


@pytest.fixture
def scenes(scenes_folder, monkeypatch):
    """Point KD_DATA at the scenes."""
    monkeypatch.setenv("KD_DATA", str(scenes_folder))
    return scenes_folder
