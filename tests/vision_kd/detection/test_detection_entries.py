"""Values of COCO files: taken as pycocotools takes them, or refused with file, entry and key before any work."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO as CocoApi  # noqa: N811
from pycocotools.cocoeval import COCOeval

from kd_common.errors import UserError
from vision_kd.detection import COCO, DetectionRecord, average_precision, write_results
from vision_kd.detection.coco import read_split

IMAGE = {"id": 7, "file_name": "a.png", "width": 100, "height": 80}
BOX = {"id": 31, "image_id": 7, "category_id": 1, "bbox": [5, 5, 40, 40]}
OTHER = {"id": 32, "image_id": 7, "category_id": 1, "bbox": [60, 30, 30, 40]}
CUP = {"id": 1, "name": "cup"}


def write(root, images=(IMAGE,), boxes=(BOX, OTHER), categories=(CUP,), **extra):
    """An annotation file, and the files of those images that can be written."""
    for image in images:
        if isinstance(image, dict) and image.get("file_name") == "a.png":
            Image.new("RGB", (100, 80)).save(root / "a.png")
    path = root / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories} | extra))
    return path


def read(path, train=False):
    return read_split(path, path.parent, train=train)


NAN, INFINITE = float("nan"), float("inf")
MALFORMED = {
    "images": {
        "id": ["shelf_01", "7", None, True, 7.5, [7], {"a": 1}, 2**53 + 1, -(2**60), 10**400, 1e300, NAN, INFINITE],
        "width": [None, "100", 0, -100, 99.5, True, [100], INFINITE],
        "height": [None, "80", 0, NAN],
        "file_name": [None, 5, "", "  ", "a\n.png", "\x1b[2Ja.png", "\ud83d.png", ["a.png"]],
    },
    "annotations": {
        "id": ["31", None, 0, -1, 1.5, True, 2**70, [31]],
        "image_id": ["7", None, 7.25, False, [7], {}],
        "category_id": ["1", None, 1.25, True, [1]],
        "bbox": [
            [],
            None,
            "5,5,9",
            [5, 5, 40],
            [5, 5, 40, 40, 0.5],
            [[5, 5, 40, 40]],
            {"x": 5, "y": 5, "w": 40, "h": 40},
            ["5", "5", "40", "40"],
            [5, None, 40, 40],
            [True, 5, 40, 40],
            [5, 5, -40, 40],
            [5, 5, 40, -1e-3],
            [NAN, 5, 40, 40],
            [5, 5, INFINITE, 40],
            [5, 5, 40, NAN],
            [5, 10**400, 40, 40],
        ],
        "area": ["1600", -1, NAN, INFINITE, True, [1600]],
        "iscrowd": ["0", "1", 2, -1, 0.5, NAN, [], {}],
    },
    "categories": {
        "id": ["1", None, True, 1.5, [1], 2**53 + 1],
        "name": [None, 1, "", " ", ["cup"], "cup\n", "\x1b[31mcup", "\udc80"],
    },
}
CASES = [(kind, key, value) for kind, keys in MALFORMED.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(("kind", "key", "value"), CASES, ids=lambda value: str(value)[:20].encode("unicode_escape"))
def test_a_malformed_value_is_refused_with_file_and_entry(tmp_path, kind, key, value):
    lists = {"images": [IMAGE], "annotations": [BOX, OTHER], "categories": [CUP]}
    lists[kind] = [*lists[kind][:-1], lists[kind][-1] | {key: value}]
    path = write(tmp_path, lists["images"], lists["annotations"], lists["categories"])
    place = f"entry {len(lists[kind]) - 1} of {kind}"
    with pytest.raises(ValueError, match=rf"instances\.json: {place} .* has {key}") as caught:
        read(path)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert not any(ord(letter) < 32 for letter in str(caught.value)), "control characters are escaped"


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("entry", [None, 5, "a", [1], True])
def test_an_entry_that_is_no_object(tmp_path, kind, entry):
    lists = {"images": [IMAGE], "annotations": [BOX], "categories": [CUP]}
    lists[kind].append(entry)
    path = write(tmp_path, lists["images"], lists["annotations"], lists["categories"])
    with pytest.raises(ValueError, match=rf"instances\.json: entry 1 of {kind} is"):
        read(path)


REQUIRED = [(kind, key) for kind, keys in MALFORMED.items() for key in keys if key not in ("area", "iscrowd")]


@pytest.mark.parametrize(("kind", "key"), REQUIRED)
def test_a_missing_value(tmp_path, kind, key):
    lists = {"images": [IMAGE], "annotations": [BOX], "categories": [CUP]}
    lists[kind] = [{k: v for k, v in lists[kind][0].items() if k != key}]
    path = write(tmp_path, lists["images"], lists["annotations"], lists["categories"])
    with pytest.raises(ValueError, match=rf"instances\.json: entry 0 of {kind} .*lacks {key}"):
        read(path)


@pytest.mark.parametrize(
    ("lists", "named"),
    [
        ({"images": [IMAGE, IMAGE | {"file_name": "b.png"}]}, "ids of images .* 7 "),
        ({"images": [IMAGE, IMAGE | {"id": 8}]}, r"file names .*a\.png"),
        ({"images": [IMAGE, IMAGE | {"id": 8, "file_name": "./a.png"}]}, r"file names .*a\.png"),
        ({"boxes": [BOX, BOX]}, "ids of annotations .* 31 "),
        ({"boxes": [BOX, BOX | {"id": 31.0}]}, "ids of annotations .* 31 "),
        ({"categories": [CUP, CUP | {"name": "mug"}]}, "category"),
        ({"categories": [CUP, CUP | {"id": 2}]}, "category"),
        ({"categories": [CUP, {"id": 2, "name": "N/A"}]}, "N/A"),
    ],
)
def test_what_is_listed_twice_or_reserved(tmp_path, lists, named):
    with pytest.raises(ValueError, match=rf"instances\.json.*{named}"):
        read(write(tmp_path, **lists))


def test_boxes_before_the_image_are_beyond_it(tmp_path):
    """Boxes given by their centre: for those at the border left or top would be negative."""
    boxes = [BOX | {"id": n, "bbox": [-20, 5, 40, 40]} for n in range(1, 5)]
    with pytest.raises(ValueError, match="4 of 4 boxes reach beyond"):
        read(write(tmp_path, boxes=boxes))


@pytest.mark.parametrize("what", ["number", "encoding", "nesting", "list"])
def test_files_that_are_no_json(tmp_path, what):
    path = write(tmp_path)
    content = {
        "number": b'{"images": [' + b"9" * 5000 + b"]}",
        "encoding": b'{"images": "\xff"}',
        "nesting": b"[" * 100_000,
        "list": b"[1]",
    }[what]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"instances\.json is not a COCO annotation file"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_unicode_encoding_is_read(tmp_path, encoding, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    path = write(tmp_path, categories=[CUP | {"name": "Köcher"}])
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode(encoding))
    assert read(path).class_names == ("Köcher",)


# ---------------------------------------------------------------- scoring


def found(split, boxes, labels, scores=None):
    """The record of these detections in the first image."""
    record = DetectionRecord(split, split.class_names)
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32).view(-1, 4)
    scores = torch.linspace(0.9, 0.5, len(boxes)) if scores is None else scores
    detections = {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64), "scores": scores}
    record.update([detections], [{"image_id": split.image_ids[0], "ratio": torch.ones(4)}])
    return record


def by_hand(path, results):
    """AP of a result file, by pycocotools alone."""
    truth = CocoApi(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return evaluation.stats[0]


@pytest.mark.parametrize("ids", [(0, 1), (-1, 0), (-5, 2**53), (1.0, 2), (3, 2**24 + 1)])
@pytest.mark.parametrize("image_id", [0, -3, 7.0, 2**24 + 1, 2**53])
def test_any_whole_ids_score_as_pycocotools_scores_them(tmp_path, capsys, ids, image_id):
    boxes = [BOX | {"category_id": ids[0]}, OTHER | {"category_id": ids[1]}]
    boxes = [box | {"image_id": image_id, "area": 1200, "iscrowd": 0} for box in boxes]
    names = [{"id": ids[0], "name": "bolt"}, {"id": ids[1], "name": "nut"}]
    path = write(tmp_path, [IMAGE | {"id": image_id}], boxes, names, info={})
    split = read(path)
    wide = [*OTHER["bbox"][:2], 36, 40]  # IoU 30 / 36
    rows, seen = found(split, [BOX["bbox"], wide], [1, 2]).gather()
    write_results(tmp_path / "results.json", rows)
    assert {(r["image_id"], r["category_id"]) for r in json.loads((tmp_path / "results.json").read_text())} == {
        (image_id, ids[0]),
        (image_id, ids[1]),
    }
    expected = by_hand(path, tmp_path / "results.json")
    assert expected == pytest.approx(0.85)
    assert average_precision(split, rows, seen)["AP"] == expected


@pytest.mark.parametrize("odd", [{"area": None}, {"iscrowd": None}, {"iscrowd": False}, {"iscrowd": 0.0}, {}])
def test_what_is_empty_is_filled_in(tmp_path, odd):
    path = write(tmp_path, boxes=[BOX | odd, OTHER | odd])
    assert len(read(path, train=True).boxes) == 2
    split = read(path)
    rows, seen = found(split, [BOX["bbox"], OTHER["bbox"]], [1, 1]).gather()
    scores = average_precision(split, rows, seen)
    assert scores["AP"] == pytest.approx(1)
    assert scores["APm"] == pytest.approx(1), "the area is that of the box"
    assert "APs" not in scores


@pytest.mark.parametrize("crowd", [1, True, 1.0])
def test_crowds(tmp_path, crowd):
    split = read(write(tmp_path, boxes=[BOX | {"iscrowd": crowd}, OTHER]), train=True)
    assert split.boxes.tolist() == [[60, 30, 90, 70]]


def test_without_detections_every_score_is_zero(tmp_path):
    """Even with a box where a placeholder for the missing detections might lie."""
    split = read(write(tmp_path, boxes=[BOX | {"bbox": [0, 0, 1, 1]}, OTHER]))
    rows, seen = found(split, [], []).gather()
    assert average_precision(split, rows, seen) == {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0, "APm": 0}


def test_no_info_is_needed(tmp_path):
    """pycocotools 2.0.10 copies it without asking whether it is there."""
    split = read(write(tmp_path))
    assert "info" not in split.api.dataset
    split.api.loadRes = None
    rows, seen = found(split, [BOX["bbox"], OTHER["bbox"]], [1, 1]).gather()
    assert average_precision(split, rows, seen)["AP"] == pytest.approx(1)


def ranks(monkeypatch, *records):
    """Let the first record gather from all, as ``gather_rows`` does in as many processes."""
    others = {7: [r._rows for r in records[1:]], 1: [r._seen for r in records[1:]]}

    def gather(rows):
        if rows.ndim == 1:
            return torch.cat([rows, *(torch.tensor(seen) for seen in others[1])])
        return torch.cat([rows, *(row for part in others[7] for row in part)])

    monkeypatch.setattr("vision_kd.detection.evaluation.gather_rows", gather)
    return records[0].gather()


def test_detections_of_the_ranks_come_once_and_in_the_order_of_the_images(tmp_path, monkeypatch):
    """Rows of one image keep their order."""
    images = [IMAGE | {"id": n, "file_name": f"{n}.png"} for n in range(1, 5)]
    for image in images:
        Image.new("RGB", (100, 80)).save(tmp_path / image["file_name"])
    split = read(write(tmp_path, images, [BOX | {"image_id": 1}]))
    records = [DetectionRecord(split, split.class_names) for _ in range(2)]
    for image_id in (1, 2, 3, 4):
        boxes = torch.tensor([[0, 0, 9, 9], [image_id, 0, 20, 20]], dtype=torch.float32)
        detections = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.25, 0.75])}
        target = {"image_id": image_id, "ratio": torch.ones(4)}
        records[(image_id - 1) % 2].update([detections], [target])
    rows, seen = ranks(monkeypatch, *records)
    assert seen == [1, 2, 3, 4]
    assert rows[:, [0, 5]].tolist() == [[n, score] for n in (1, 2, 3, 4) for score in (0.25, 0.75)]


# ---------------------------------------------------------------- files of images


@pytest.mark.parametrize("name", ["sub/a.png", "../b.png", "./sub/../a.png"])
def test_file_names_may_lead_to_other_folders(tmp_path, name):
    folder = tmp_path / "images"
    for path in (folder / "sub/a.png", folder / "a.png", tmp_path / "b.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80)).save(path)
    split = read_split(write(tmp_path, [IMAGE | {"file_name": name}]), folder, train=True)
    assert split.files == [name]
    absolute = str(tmp_path / "b.png")
    assert read_split(write(tmp_path, [IMAGE | {"file_name": absolute}]), folder, train=True).files == [absolute]


@pytest.mark.parametrize(
    "name",
    ["sub\\a.png", "gone/a.png", "/nowhere/a.png", "A.PNG", "sub/", ".", "sub", "https://host/a.png", "link.png"],
)
def test_files_that_are_not_there_are_named(tmp_path, name):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "sub/a.png")
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("gone.png")
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, [IMAGE | {"file_name": name}]))
    assert f": {name}" in str(caught.value)
    assert ("write /" in str(caught.value)) == ("\\" in name)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


STORED = {  # how the pixels of an upright image lie in the file, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_boxes_are_those_of_the_upright_image(tmp_path, orientation):
    """The object is at the top left of what viewers show, whatever way the pixels are stored."""
    upright = np.full((80, 100, 3), 30, np.uint8)
    upright[5:45, 5:45] = 220
    stored = STORED[orientation](upright)
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=turned(orientation), quality=95)
    path = write(tmp_path, [IMAGE | {"file_name": "a.jpg"}], [BOX])
    data = COCO(
        root=str(tmp_path),
        train_annotations=path.name,
        train_images=".",
        val_annotations=path.name,
        val_images=".",
        train_sizes=(80,),
        val_size=80,
        flip=False,
        num_workers=0,
        batch_size=1,
    )
    data.setup("fit")
    ((image,), (target,)) = next(iter(data.train_dataloader()))
    left, top, right, bottom = (round(v) for v in target["boxes"][0].tolist())
    assert image[:, top + 2 : bottom - 2, left + 2 : right - 2].float().mean() > 210
    assert image[:, bottom + 2 :].float().mean() < 40


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("train", [True, False])
def test_sizes_of_the_stored_pixels_are_refused(tmp_path, orientation, train):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg", exif=turned(orientation))
    path = write(tmp_path, [IMAGE | {"file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r"a\.jpg is 80 x 100 pixels.* 100 x 80.*EXIF"):
        read(path, train)


def test_images_without_a_box_are_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("vision_kd.detection.coco.rank_zero_info", said.append)
    images = [IMAGE, IMAGE | {"id": 8, "file_name": "b.png"}]
    Image.new("RGB", (100, 80)).save(tmp_path / "b.png")
    assert len(read(write(tmp_path, images), train=True)) == 1
    assert ["1 of 2 images have no box" in text for text in said] == [True]
    assert len(read(write(tmp_path, images))) == 2
    assert len(said) == 1
