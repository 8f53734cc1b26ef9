"""Runs of the packages resumed from checkpoints that a standard callback wrote inside an epoch: as if undisturbed.

Every hook of Lightning, under many settings, is tested with a toy in tests/common/test_training.py.
"""

from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from vision_kd.detection import DetectionModule
from vision_kd.training.classification import DistillationModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
ACCUMULATED = ["--trainer.val_check_interval=1", "--trainer.accumulate_grad_batches=2"]


@pytest.fixture
def resume_and_compare(tmp_path, outcome, assert_equal):
    """Train with a checkpoint at every update, go on from two of them in folders of their own, and compare the ends."""

    def check(package, arguments, *, updates, numbers):
        torch.set_num_threads(1)
        fit = import_module(f"{package}.fit")
        saving = [
            "--trainer.callbacks+=ModelCheckpoint",
            f"--trainer.callbacks.dirpath={tmp_path / 'saved'}",
            "--trainer.callbacks.filename={step}",
            "--trainer.callbacks.every_n_train_steps=1",
            "--trainer.callbacks.save_top_k=-1",
        ]

        def train(folder, *more):
            result = fit.run(fit.build([*arguments, f"--run_dir={folder}", *more]))
            found = outcome(folder)
            # A best one of before lies in the folder of the run that was resumed.
            found["models"] = {name: model for name, model in found["models"].items() if "last" in name}
            return found, result.history

        expected = train(tmp_path / "whole", *saving)
        assert len(list((tmp_path / "saved").iterdir())) == updates
        for number in numbers:
            found = train(tmp_path / f"from{number}", f"--ckpt_path={tmp_path / 'saved' / f'step={number}.ckpt'}")
            assert_equal(found, expected, f"step {number}")
        return tmp_path / "saved" / f"step={numbers[0]}.ckpt"

    return check


def test_classifier(tmp_path, tiny_run, resume_and_compare):
    extra = ["--model.accumulate=2", "--trainer.val_check_interval=1", "--model.ema_decay=0.9"]
    path = resume_and_compare("vision_kd", [*tiny_run("vision_kd", tmp_path), *extra], updates=6, numbers=(3, 4))
    module = DistillationModule.load_from_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)
    assert [entry["step"] for entry in module.history] == [entry["step"] for entry in saved["history"]]
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_of_images(tmp_path, resume_and_compare, workers):
    draws = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for label in ("even", "odd"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(draws.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                picture.save(tmp_path / "images" / split / label / f"{number}.png")
    arguments = [
        "--config=methods/vanilla",
        "--data=ImageFolder",
        f"--data.root={tmp_path / 'images'}",
        "--data.image_size=16",
        f"--data.num_workers={workers}",
        "--data.batch_size=2",
        "--model.student.name=resnet8",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]
    resume_and_compare("vision_kd", arguments, updates=10, numbers=(3, 7))


def test_detector(tmp_path, resume_and_compare):
    arguments = [
        "--config=detection/demo",
        "--config=methods/vanilla",
        "--model.topk=null",
        "--baseline=null",
        "--model.student.name=fasterrcnn_resnet10_quarter_fpn",
        "--model.student.args={fpn_channels: 8, representation_size: 16}",
        "--data.train_subset=4",
        "--data.train_sizes=[64, 72]",
        "--data.val_size=64",
        "--data.batch_size=2",
        "--trainer.limit_val_batches=1",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]
    path = resume_and_compare("vision_kd", arguments, updates=4, numbers=(1, 3))
    assert DetectionModule.load_from_checkpoint(path, weights_only=True).history == []


@pytest.mark.parametrize("package", ["llm_kd", "spec_decode"])
def test_language_models(package, tmp_path, tiny_run, resume_and_compare):
    resume_and_compare(package, [*tiny_run(package, tmp_path), *ACCUMULATED], updates=6, numbers=(3, 5))


def test_on_policy_with_a_memory(tmp_path, tiny_run, resume_and_compare):
    extra = ["--model.rollout=AdaptiveReplay", "--model.rollout.capacity=3", "--model.rollout.tolerance=-1"]
    extra += ["--model.rollout.step=0.9", "--model.rollout.sampling.max_new_tokens=3", "--trainer.val_check_interval=2"]
    resume_and_compare("llm_kd", [*tiny_run("llm_kd", tmp_path), *extra], updates=9, numbers=(4, 5))
