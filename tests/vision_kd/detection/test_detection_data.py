"""COCO-format data: what is read, scaled, grouped and shared out, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vision_kd.detection import COCO, DigitScenes
from vision_kd.detection.coco import clipped, read_split
from vision_kd.detection.data import ShapeSampler, scaled_size
from vision_kd.detection.evaluation import average_precision
from vision_kd.detection.scenes import build_scenes

TRUTH = [
    {"image_id": 10, "category_id": 3, "bbox": [4, 5, 10, 20]},
    {"image_id": 10, "category_id": 9, "bbox": [30, 20, 20, 5]},  # reaches beyond the right border
    {"image_id": 20, "category_id": 7, "bbox": [0, 0, 30, 40]},
    {"image_id": 20, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    {"image_id": 30, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
]


@pytest.fixture
def root(tools, tmp_path):
    for split in ("train2017", "val2017"):
        tools.write_coco(tmp_path, TRUTH, split=split)
    return tmp_path


def read(root, split="train", **settings):
    return read_split(
        root / f"annotations/instances_{split}2017.json", root / f"{split}2017", train=split == "train", **settings
    )


def module(root, **settings):
    return COCO(root=str(root), num_workers=0, **{"batch_size": 2, "train_sizes": (60,), "val_size": 60} | settings)


# ---------------------------------------------------------------- reading


def test_category_ids_with_gaps_become_labels_without(root):
    split = read(root)
    assert (split.category_ids, split.class_names) == ((3, 7, 9), ("c3", "c7", "c9"))
    assert split.labels.tolist() == [1, 3, 2]
    assert split.boxes.tolist() == [[4, 5, 14, 25], [30, 20, 40, 25], [0, 0, 30, 40]]
    assert [split.truth(n)[1].tolist() for n in range(len(split))] == [[1, 3], [2]]


def test_crowd_regions_and_images_without_boxes_are_validated_but_not_trained_on(root):
    assert read(root).image_ids == [10, 20]
    val = read(root, "val")
    assert val.image_ids == [10, 20, 30]
    assert len(val.truth(2)[0]) == 0
    assert len(val.api.anns) == 5, "pycocotools knows of the crowd regions"


def test_missing_annotation_file(tmp_path):
    with pytest.raises(ValueError, match=r"instances_val2017\.json(?s:.*)annotations_trainval2017\.zip"):
        COCO(root=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "COCO annotation file"),
        ("[]", "COCO annotation file"),
        ('{"images": [], "annotations": []}', "no list of categories"),
        ('{"images": [], "annotations": [], "categories": []}', "at least one category"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "a name of its own",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no image with a box"),
    ],
)
def test_files_that_are_no_annotations(root, content, message):
    (root / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(root)


def test_images_listed_but_absent(root):
    (root / "train2017/2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        read(root)
    with pytest.raises(ValueError, match="folder of the images"):
        read_split(root / "annotations/instances_train2017.json", root / "nowhere", train=True)


@pytest.mark.parametrize(("image", "category", "unknown"), [(99, 3, "images"), (10, 4, "categories")])
def test_annotations_of_unknown_images_or_categories(tools, tmp_path, image, category, unknown):
    entry = {"image_id": image, "category_id": category, "bbox": [0, 0, 5, 5]}
    tools.write_coco(tmp_path, [*TRUTH, entry], split="train2017")
    with pytest.raises(ValueError, match=f"annotations 6 .*{unknown}"):
        read(tmp_path)


def test_clipping():
    corners = np.array([[-5, 10, 15, 60], [5, 5, 45, 20], [-3, -4, 50, 60]], dtype=np.float64)
    sizes = np.array([[40, 30], [40, 30], [20, 10]])
    assert clipped(corners, sizes).tolist() == [[0, 10, 15, 30], [5, 5, 40, 20], [0, 0, 20, 10]]


@pytest.mark.parametrize("box", [[5, 5, 0, 3], [40, 0, 5, 5], [0, -9, 5, 9], [5, 5, 1e-9, 3]])
def test_boxes_without_area_inside_their_image(tools, tmp_path, box):
    """The last has none in float32, in which boxes are compared."""
    entries = [
        {"image_id": 10, "category_id": 3, "bbox": box},
        {"image_id": 10, "category_id": 3, "bbox": [1, 1, 5, 5]},
    ]
    for split, what in (("train", "left out of training"), ("val", "count as missed")):
        tools.write_coco(tmp_path, entries, split=f"{split}2017")
        with pytest.warns(UserWarning, match=rf"1 of 2 boxes .*{what}.* \(annotations 1\)"):
            assert read(tmp_path, split).boxes.tolist() == [[1, 1, 6, 6]]


def test_a_few_boxes_without_area_are_left_out_with_a_warning(tools, tmp_path):
    many = [{"image_id": 10, "category_id": 3, "bbox": [1, 1, 5, 5]}] * 250
    bad = [
        {"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, 4]},
        {"image_id": 20, "category_id": 3, "bbox": [50, 0, 5, 5]},
    ]
    tools.write_coco(tmp_path, [*many, *bad], split="train2017")
    with pytest.warns(UserWarning, match=r"2 of 252 boxes have no area .* \(annotations 251, 252\)"):
        split = read(tmp_path)
    assert split.image_ids == [10]
    assert len(split.boxes) == 250


def test_many_boxes_without_area_are_another_format(tools, tmp_path):
    bad = [{"image_id": 10, "category_id": 3, "bbox": [39, 5, 0, 25]}] * 4
    tools.write_coco(tmp_path, [*TRUTH, *bad], split="train2017")
    with pytest.raises(ValueError, match=r"4 of 7 boxes have no area .*\[left, top, width, height\]"):
        read(tmp_path)


def test_corners_and_shares_of_the_image_are_refused(tools, tmp_path):
    """The two usual mistakes; both leave every box an area inside its image."""
    corners = [{"image_id": 10, "category_id": 3, "bbox": [15, 10, 30 + n, 28]} for n in range(4)]
    tools.write_coco(tmp_path, corners, split="train2017")
    with pytest.raises(ValueError, match=r"4 of 4 boxes reach beyond their image .*\[left, top, width, height\]"):
        read(tmp_path)
    tools.write_coco(tmp_path, [{"image_id": 10, "category_id": 3, "bbox": [0.1, 0.2, 0.3, 0.4]}], split="train2017")
    with pytest.raises(ValueError, match=r"no box reaches further than 0\.6 pixels"):
        read(tmp_path)


def test_what_follows_from_the_boxes_may_be_left_out(tools, tmp_path):
    """pycocotools needs `area` and `iscrowd` to score."""
    path = tools.write_coco(tmp_path, TRUTH[:3])
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))
    split = read(tmp_path, "val")
    rows = torch.tensor([[10, 4, 5, 10, 20, 0.9, 3]], dtype=torch.float64)
    assert average_precision(split, rows, split.image_ids)["AP50"] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("annotations", "bbox", None, r"entry 1 of annotations \(id 2\) lacks bbox"),
        ("images", "width", None, r"entry 1 of images \(id 20\) lacks width"),
        ("annotations", "id", 0, "entry 1 of annotations .* has id 0: .* at least 1"),
        ("annotations", "id", 1, "ids of annotations must be distinct, got 1 "),
    ],
)
def test_incomplete_entries(tools, tmp_path, kind, key, value, message):
    path = tools.write_coco(tmp_path, TRUTH)
    content = json.loads(path.read_text())
    if value is None:
        del content[kind][1][key]
    else:
        content[kind][1][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "val")


def test_validation_needs_a_box_to_score_against(tools, tmp_path):
    tools.write_coco(tmp_path, [])
    with pytest.raises(ValueError, match="no box"):
        read(tmp_path, "val")


def test_splits_must_have_the_same_categories(tools, root):
    tools.write_coco(root, TRUTH[:1], split="val2017", ids=(3, 7, 8))
    with pytest.raises(ValueError, match="categories"):
        module(root).setup("fit")


def test_an_image_of_another_size_than_annotated(root):
    """Before training, and once it has changed after that check."""
    data = module(root)
    data.setup("fit")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(root / "train2017/1.png")
    with pytest.raises(ValueError, match=r"1\.png is 20 x 20 .* 40 x 30"):
        list(data.train_dataloader())
    with pytest.raises(ValueError, match=r"1\.png is 20 x 20 .* 40 x 30"):
        module(root).setup("fit")


@pytest.mark.parametrize("settings", [{"train_sizes": ()}, {"val_size": 0}, {"batch_size": 0}, {"train_subset": 3}])
def test_settings_out_of_range(root, settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        module(root, **settings).setup("fit")


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (1067, 800)), ((480, 640), (800, 1067)), ((1000, 200), (1333, 267))]
)
def test_scaled_size(size, expected):
    assert scaled_size(*size, 800, 1333) == expected


def test_boxes_follow_their_pixels(tmp_path, tools):
    """A white box on black: after scaling and mirroring the box is where the white pixels are."""
    for split in ("train2017", "val2017"):
        tools.write_coco(tmp_path, [{"image_id": 10, "category_id": 3, "bbox": [10, 6, 8, 12]}], split=split)
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[6:18, 10:18] = 255
    Image.fromarray(pixels).save(tmp_path / "train2017/1.png")
    data = module(tmp_path, train_sizes=(60, 90), batch_size=1)
    data.setup("fit")
    seen = set()
    for seed in range(40):
        image, target = data.train_dataloader().dataset[(0, seed)]
        rows, columns = (image[0] > 127).nonzero(as_tuple=True)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][0].tolist() == pytest.approx([float(v) for v in found], abs=1)
        seen.add((image.shape[1], float(found[0]) / image.shape[2] > 0.5))
    assert seen == {(60, False), (60, True), (90, False), (90, True)}


def test_a_sample_is_a_function_of_its_seed(root):
    data = module(root, train_sizes=(40, 60, 80))
    data.setup("fit")
    images = data.train_dataloader().dataset
    (first, target), (second, again) = images[(0, 123456789012)], images[(0, 123456789012)]
    assert torch.equal(first, second)
    assert target["seed"] == again["seed"]
    assert target["seed"] != images[(0, 987654321098)][1]["seed"]


def sampler(portrait, batch, rank=0, world=1, seed=0, epoch=0):
    made = ShapeSampler(portrait, batch, seed=seed, rank=rank, world_size=world)
    made.set_epoch(epoch)
    return made


def test_batches_of_one_shape():
    portrait = torch.arange(61) % 3 == 0
    order = [row for row, _ in sampler(portrait, 4)]
    assert len(order) == len(set(order)) == 60
    shapes = [{bool(portrait[row]) for row in order[i : i + 4]} for i in range(0, 60, 4)]
    assert sum(len(shape) > 1 for shape in shapes) <= 1, "21 portrait and 40 landscape images leave one mixed batch"
    assert {True} in shapes[:10], "the order of the batches is random"
    assert [row for row, _ in sampler(portrait, 4, epoch=1)] != order


def test_ranks_share_the_batches_of_one_process():
    portrait = torch.arange(50) % 4 == 0
    whole = list(sampler(portrait, 6, seed=3))
    ranks = [list(sampler(portrait, 3, rank, 2, seed=3)) for rank in range(2)]
    for i in range(len(whole) // 6):
        both = [item for rank in ranks for item in rank[3 * i : 3 * i + 3]]
        assert sorted(both) == sorted(whole[6 * i : 6 * i + 6]), "same images, same seeds"
    assert len(ranks[0]) == len(ranks[1]) == len(whole) // 2


def test_every_validation_image_once_over_all_ranks(root, monkeypatch):
    seen = []
    for rank in range(2):
        data = module(root, val_batch_size=1)
        monkeypatch.setattr(COCO, "rank", rank)
        monkeypatch.setattr(COCO, "world_size", 2)
        data.setup("validate")
        seen += [target["image_id"] for _, targets in data.val_dataloader() for target in targets]
    assert sorted(seen) == [10, 20, 30]


# ---------------------------------------------------------------- the embedded scenes


def test_scenes(scenes):
    data = DigitScenes()
    data.setup("fit")
    train, val = data.split("train"), data.split("val")
    assert data.class_names == tuple("0123456789")
    assert (len(train.api.imgs), len(val)) == (320, 100)
    assert len(train) < 320, "some scenes are empty"
    assert set(train.labels.tolist()) == set(val.labels.tolist()) == set(range(1, 11))
    for split in (train, val):
        sides = split.boxes[:, 2:] - split.boxes[:, :2]
        areas = sides.prod(1)
        assert min((areas < 32**2).sum(), ((areas > 32**2) & (areas < 96**2)).sum(), (areas > 96**2).sum()) >= 20
    images, targets = next(iter(data.train_dataloader()))
    assert all(image.dtype == torch.uint8 for image in images)
    assert len({image.shape[1] > image.shape[2] for image in images}) == 1
    assert sum(len(target["boxes"]) for target in targets) > 0


@pytest.mark.slow
def test_scenes_are_built_once_and_the_same_every_time(scenes, tmp_path):
    folder = tmp_path / "again"
    build_scenes(folder)
    for name in (
        "annotations/instances_train.json",
        "annotations/instances_val.json",
        "train/0007.jpg",
        "val/0042.jpg",
    ):
        assert (folder / name).read_bytes() == (scenes / "digit_scenes_1" / name).read_bytes(), name
    (folder / "val/0042.jpg").write_bytes(b"mine")
    build_scenes(folder)
    assert (folder / "val/0042.jpg").read_bytes() == b"mine"
    assert not list(tmp_path.glob(".again.*")), "no partial folder is left"


def test_scene_boxes_lie_in_their_images(scenes):
    counts = {}
    for split in ("train", "val"):
        content = json.loads((scenes / f"digit_scenes_1/annotations/instances_{split}.json").read_text())
        counts[split] = len(content["annotations"])
        assert all(a["bbox"][0] >= 0 and a["bbox"][0] + a["bbox"][2] <= 320 for a in content["annotations"])
    assert counts["train"] > 800
    assert counts["val"] > 250
