"""A run of a detector on two gloo processes against one process with the doubled batch."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image

from vision_kd.detection import DetectionModule, build_detector
from vision_kd.fit import build, run
from vision_kd.models import ModelSpec, save_student

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

NAME = "fasterrcnn_resnet10_quarter_fpn"
# Every image yields full samples, so that the mean over the ranks is the mean over the batch.
ARGS = (
    "{norm: group, fpn_channels: 8, representation_size: 16, anchor_sizes: [8, 16, 32, 64, 128], "
    "rpn_batch_size_per_image: 16, box_batch_size_per_image: 8, rpn_pre_nms_top_n_train: 60, "
    "rpn_post_nms_top_n_train: 40, rpn_pre_nms_top_n_test: 60, rpn_post_nms_top_n_test: 40}"
)


def arguments(folder, root, batch):
    # One size: ranks pad their own batches, so that the borders of smaller images would see other zeros.
    return [
        "--config=detection/demo",
        "--data=COCO",
        f"--data.root={root}",
        "--data.num_workers=0",
        "--baseline=null",
        f"--run_dir={folder}",
        "--trainer.accelerator=cpu",
        "--trainer.precision=64-true",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--model.topk.k_start=1",
        "--trainer.enable_progress_bar=false",
        "--data.train_sizes=[64]",
        "--data.val_size=64",
        f"--data.batch_size={batch}",
        f"--data.val_batch_size={batch}",
        f"--model.student.args={ARGS}",
        f"--model.teacher.args={ARGS}",
        f"--model.teacher.checkpoint={root / 'teacher.pt'}",
        "--model.gsnr_every=2",
        "--model.method.temperature=2.0",
    ]


def outcome(cli):
    """Run, and return what is to be compared, the losses of every step among it."""
    losses, step = [], DetectionModule.component_step

    def recorded(model, *args, **settings):
        made = step(model, *args, **settings)
        if model is cli.model:  # not its copy in the dry step
            losses.append({name: float(value) for name, value in made.components.items()})
        return made

    with mock.patch.object(DetectionModule, "component_step", recorded):
        result = run(cli)
    rows, seen = cli.model._detected
    state = cli.model.state_dict()
    return {"state": state, "history": result.history, "rows": rows, "seen": seen, "losses": losses}


def distributed_run(root):
    """What each of the two processes does; leaves what it found in the folder."""
    torch.set_num_threads(1)
    root = Path(root)
    cli = build([*arguments(root / "two", root, 2), "--trainer.devices=2", "--trainer.strategy=ddp"])
    torch.save(outcome(cli), root / f"rank{cli.trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection_ddp")
    generator = torch.Generator().manual_seed(1)
    (folder / "annotations").mkdir()
    for split, count in (("train2017", 12), ("val2017", 7)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            pixels = torch.randint(256, (64, 64, 3), generator=generator).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
            for category in (1, 2, 5):
                left, top, width, height = torch.randint(8, 32, (4,), generator=generator).tolist()
                box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, **box})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": i, "name": f"c{i}"} for i in (1, 2, 5)]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    torch.manual_seed(3)
    data_spec = {"class_names": ("c1", "c2", "c5"), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    args = yaml.safe_load(ARGS)
    save_student(folder / "teacher.pt", build_detector(ModelSpec(NAME, args), **data_spec), ModelSpec(NAME, args))
    return folder


@pytest.fixture(scope="module")
def ranks(root, run_ranks):
    run_ranks(distributed_run, root, str(root))
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_equal_one_with_the_doubled_batch(ranks, root, tmp_path):
    torch.set_num_threads(1)
    cli = build(arguments(tmp_path / "one", root, 4))
    one = outcome(cli)
    assert one["seen"] == list(range(1, 8))
    for found in ranks:
        for key, value in one["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=0, atol=1e-10)
        assert found["seen"] == one["seen"], "each image once, whichever rank saw it"
        torch.testing.assert_close(found["rows"], one["rows"], rtol=0, atol=1e-6)
        for epoch, expected in zip(found["history"], one["history"], strict=True):
            assert {k: v for k, v in epoch.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in expected.items() if k != "seconds"}, rel=1e-6
            )
    for step, expected in enumerate(one["losses"]):
        for name, value in expected.items():
            both = sum(found["losses"][step][name] for found in ranks) / 2
            assert both == pytest.approx(value, rel=1e-6), (step, name)
