"""A script of a user's own, with Lightning alone: the weights, and the exported models, are those of the command."""

import csv
import importlib

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from kd_common.sampling import SamplingParams
from kd_common.schedules import CosineDecay
from llm_kd.data import TextDataModule
from llm_kd.models import StudentSpec, TeacherSpec, load_teacher
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule as LanguageModule
from llm_kd.training.rollout import OnPolicy
from spec_decode.data.datamodule import TargetText
from spec_decode.decoding.sampling import Sampling
from spec_decode.drafters import FastEagle
from spec_decode.models.target import TargetSpec
from spec_decode.training.drafter_module import DrafterModule
from vision_kd.data import Digits
from vision_kd.models import ModelSpec
from vision_kd.training.classification import DistillationModule as VisionModule
from vision_kd.training.specs import DynamicTopK
from vision_kd.training.specs import TeacherSpec as VisionTeacher

EPOCHS = 2
SAME = [f"--trainer.max_epochs={EPOCHS}", "--trainer.gradient_clip_val=null"]


def vision(folder, target):
    data = Digits(batch_size=32, train_subset=96, seed=5)
    return data, VisionModule(
        ModelSpec("resnet8"),
        **VisionModule.data_spec(data),
        teacher=VisionTeacher("resnet8", epochs=1, learning_rate=0.05),
        topk=DynamicTopK(k_start=0.05, k_opt=0.5, phase_ends=(0.3, 0.6)),
        learning_rate=0.05,
        gsnr_every=2,
        seed=5,
    )


def language(folder, target):
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "val")}
    sampling = SamplingParams(temperature=0.0, max_new_tokens=4)
    data = TextDataModule(str(target), **files, sampling=sampling, batch_size=4, seed=5)
    return data, LanguageModule(TeacherSpec(str(target)), StudentSpec(layers=2), learning_rate=1e-3, seed=5)


def drafting(folder, target):
    how = {"sampling": Sampling(temperature=0.0, max_new_tokens=6), "generation_batch_size": 3}
    data = TargetText(limit=8, val_prompts=2, **how, max_length=200, batch_size=2, seed=5)
    drafter = FastEagle(depth=2, draft_vocab=90)
    return data, DrafterModule(TargetSpec(str(target), "float32"), drafter, CosineDecay(), learning_rate=5e-4, seed=5)


PACKAGES = {"vision_kd": vision, "llm_kd": language, "spec_decode": drafting}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plain_trainer_trains_what_the_command_trains(package, tiny_run, target, tmp_path):
    arguments = [*tiny_run(package, tmp_path), *SAME]  # which writes the data, too
    lightning.seed_everything(5)
    data, module = PACKAGES[package](tmp_path, target)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path / "own",
    )
    trainer.fit(module, data)

    fit = importlib.import_module(f"{package}.fit")
    cli = fit.build([*arguments, f"--run_dir={tmp_path / 'run'}"])
    fit.run(cli)
    expected = cli.model.state_dict()
    assert list(expected) == list(module.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for which in ("best", "last"):
        assert (tmp_path / "own" / module.export_name.format(which)).exists()


def test_validating_afterwards_adds_nothing_and_a_stale_export_is_said(tmp_path):
    data, module = vision(tmp_path, None)
    trainer = lightning.Trainer(
        max_epochs=3,
        check_val_every_n_epoch=2,
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.warns(UserWarning, match="student_last"):
        trainer.fit(module, data)
    assert [epoch["epoch"] for epoch in module.history] == [1]
    trainer.validate(module, data, verbose=False)
    assert [epoch["epoch"] for epoch in module.history] == [1]


def test_validating_afterwards_logs_no_training(target, tmp_path):
    """Of a module whose history also sums up the training since the last validation."""
    data, module = drafting(None, target)
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, logger=logger, **settings)
    trainer.fit(module, data)
    logged = (tmp_path / "metrics.csv").read_text()
    trained, sums = list(module.history), dict(module._since_validation)
    trainer.validate(module, data, verbose=False)
    assert (module.history, module._since_validation) == (trained, sums)
    rows = [list(csv.DictReader(text.splitlines())) for text in (logged, (tmp_path / "metrics.csv").read_text())]
    assert [sum(bool(row.get("epoch/loss")) for row in found) for found in rows] == [1, 1]


def test_an_attached_teacher_answers_what_a_student_that_writes_is_validated_on(tiny_run, target, tmp_path):
    tiny_run("llm_kd", tmp_path)  # writes the files
    data, module = language(tmp_path, target)
    module.rollout = OnPolicy(fraction=1.0, sampling=SamplingParams(max_new_tokens=2))
    module.attach_teacher(OnlineTeacher(load_teacher(TeacherSpec(str(target)))))
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path, **settings).fit(module, data)
    assert data.prompts_only
    assert [epoch["epoch"] for epoch in module.history] == [0]


def test_data_follow_the_target_of_the_module_that_trains(target):
    data, first = drafting(None, target)
    _, second = drafting(None, target)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    for module in (first, second, second):
        module.obtain(data, trainer)
        assert data.target is module.target
