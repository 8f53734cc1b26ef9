"""Average precision, against pycocotools used by hand; result files; gathering; pictures."""

import json
from dataclasses import replace

import pytest
import torch
from pycocotools.coco import COCO as CocoApi  # noqa: N811
from pycocotools.cocoeval import COCOeval

from vision_kd.detection import COCO, DetectionRecord, average_precision, evaluate_detector, write_results
from vision_kd.detection.coco import read_split
from vision_kd.detection.draw import draw_detections

SIZES = ((400, 300), (200, 300), (120, 120))
TRUTH = [
    {"image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 20]},  # small
    {"image_id": 10, "category_id": 7, "bbox": [100, 50, 60, 60]},  # medium
    {"image_id": 20, "category_id": 9, "bbox": [20, 40, 150, 200]},  # large
    {"image_id": 20, "category_id": 3, "bbox": [0, 0, 50, 30], "iscrowd": 1},
]


@pytest.fixture
def path(tools, tmp_path):
    return tools.write_coco(tmp_path, TRUTH, sizes=SIZES)


@pytest.fixture
def split(path):
    return read_split(path, path.parents[1] / "val2017", train=False)


def rows_of(*found):
    return torch.tensor([[image, *box, score, category] for image, category, box, score in found]).double()


PERFECT = rows_of((10, 3, [10, 10, 20, 20], 0.9), (10, 7, [100, 50, 60, 60], 0.8), (20, 9, [20, 40, 150, 200], 0.7))


def test_perfect_detections(split):
    assert average_precision(split, PERFECT, split.image_ids) == pytest.approx(
        dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 1.0)
    )


def test_nothing_detected(split):
    found = average_precision(split, torch.zeros(0, 7, dtype=torch.float64), split.image_ids)
    assert set(found.values()) == {0.0}


def test_a_size_that_does_not_occur_is_left_out(split):
    assert average_precision(split, PERFECT[:2], [10]).keys() == {"AP", "AP50", "AP75", "APs", "APm"}


def test_a_detection_in_a_crowd_region_is_no_mistake(split):
    """It would lower the precision if it came first and the region did not excuse it."""
    inside = rows_of((20, 3, [5, 5, 20, 15], 0.99))
    assert average_precision(split, torch.cat([inside, PERFECT]), split.image_ids)["AP"] == pytest.approx(1.0)
    outside = rows_of((20, 3, [150, 250, 20, 15], 0.99))
    assert average_precision(split, torch.cat([outside, PERFECT]), split.image_ids)["AP"] < 1.0


def test_random_detections_against_pycocotools_reading_the_result_file(split, path, tmp_path, capsys):
    generator = torch.Generator().manual_seed(2)
    noisy = PERFECT[torch.randint(3, (40,), generator=generator)]
    noisy[:, 1:5] += torch.randint(-8, 9, (40, 4), generator=generator)
    noisy[:, 5] = torch.rand(40, generator=generator, dtype=torch.float64)
    found = average_precision(split, noisy, split.image_ids)
    assert capsys.readouterr().out == ""

    write_results(tmp_path / "results.json", noisy)
    first = json.loads((tmp_path / "results.json").read_text())[0]
    assert first.keys() == {"image_id", "category_id", "bbox", "score"}
    truth = CocoApi(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert list(found.values()) == pytest.approx(evaluation.stats[:6].tolist())
    assert 0 < found["AP"] < 1


def test_a_record_returns_to_original_pixels_and_category_ids(split):
    record = DetectionRecord(split, ["c9", "other", "c3"])
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 8.0, 6.0]])
    detections = {"boxes": boxes, "labels": torch.tensor([3, 2, 1]), "scores": torch.tensor([0.5, 0.9, 0.25])}
    target = {"image_id": 20, "ratio": torch.tensor([2.0, 4.0, 2.0, 4.0])}
    record.update([detections], [target])
    rows, seen = record.gather()
    assert seen == [20]
    assert rows.tolist() == [[20, 5, 5, 10, 10, 0.5, 3], [20, 1, 0.5, 3, 1, 0.25, 9]], "`other` is no category here"
    record.update([detections], [target])
    with pytest.raises(RuntimeError, match="1 validation images were seen more than once"):
        record.gather()


def test_evaluation_finds_what_a_detector_knows(tools, path):
    """Detections given in scaled pixels score as perfect; order of the classes differs from the data's."""
    data = COCO(root=str(path.parents[1]), val_size=90, longest=400, num_workers=0, val_batch_size=2)

    class Oracle(torch.nn.Module):
        class_names = ("c9", "c3", "c7")

        def __init__(self):
            super().__init__()
            self.rows = iter(range(3))

        def class_indices(self, names):
            return [0, *(self.class_names.index(name) + 1 for name in names)]

        def forward(self, images):
            found = []
            for image in images:
                row = next(self.rows)
                boxes, labels = split.truth(row)
                ratio = torch.tensor([image.shape[2], image.shape[1]] * 2) / split.sizes[row].repeat(2)
                names = [split.class_names[label - 1] for label in labels.tolist()]
                labels = torch.tensor([self.class_names.index(name) + 1 for name in names], dtype=torch.int64)
                found.append({"boxes": boxes * ratio, "labels": labels, "scores": torch.ones(len(boxes))})
            return found

    split = data.split("val")
    record = evaluate_detector(Oracle(), data)
    rows, seen = record.gather()
    assert seen == [10, 20, 30]
    assert average_precision(split, rows, seen)["AP"] == pytest.approx(1.0)


def test_pictures(split, tmp_path):
    draw_detections(tmp_path / "p.png", split, PERFECT, [10, 30], threshold=0.85)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_as_they_are(split, tmp_path):
    """No formulas: matplotlib refuses this one."""
    named = replace(split, class_names=("$\\frac$", "US$5", "c9"))
    draw_detections(tmp_path / "p.png", named, PERFECT, [10], threshold=0.5)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
