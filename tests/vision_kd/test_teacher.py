"""Obtaining a teacher: trained once, cached under everything that decides its weights, refused when unusable."""

import logging
from dataclasses import replace

import pytest
import torch

import vision_kd.teacher
from kd_common.files import cache_root
from vision_kd.data import Digits
from vision_kd.evaluate import accuracy
from vision_kd.fit import build, launched_from_outside, run
from vision_kd.models import load_classifier, save_student
from vision_kd.specs import TeacherSpec
from vision_kd.teacher import obtain_teacher, teacher_cache_path

SPEC = TeacherSpec("resnet8", epochs=3)
CONFIG = {"class_path": "vision_kd.data.Digits", "init_args": {"batch_size": 32, "seed": 0, "train_subset": 256}}


def digits(**changed):
    """The DataModule of CONFIG, with changed arguments, and its configuration."""
    arguments = CONFIG["init_args"] | changed
    return Digits(**arguments), CONFIG | {"init_args": arguments}


@pytest.fixture
def trainings(monkeypatch):
    """Counts how often a teacher is trained."""
    calls, train = [], vision_kd.teacher.train_teacher

    def counted(*args):
        calls.append(args)
        return train(*args)

    monkeypatch.setattr(vision_kd.teacher, "train_teacher", counted)
    return calls


def top1(classifier):
    data = Digits()
    data.setup("validate")
    return accuracy(classifier, data.val_dataloader(), 10, "cpu")["top1"]


def test_trained_once_then_read_from_the_cache(trainings):
    first, origin = obtain_teacher(SPEC, *digits())
    path = teacher_cache_path(SPEC, CONFIG)
    assert origin == f"trained for 3 epochs, cached as {path}"
    assert top1(first) > 0.3

    second, origin = obtain_teacher(SPEC, *digits())
    assert origin == f"from the cache, {path}"
    assert len(trainings) == 1
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert (second.mean, second.std) == (first.mean, first.std)


def test_all_seeds_of_the_student_share_the_teacher(trainings):
    one, _ = obtain_teacher(SPEC, *digits(seed=1))
    data, config = digits(seed=2)
    assert teacher_cache_path(SPEC, config) == teacher_cache_path(SPEC, CONFIG)
    assert obtain_teacher(SPEC, data, config)[1].startswith("from the cache")
    teacher_cache_path(SPEC, CONFIG).unlink()
    two, _ = obtain_teacher(SPEC, data, config)
    assert len(trainings) == 2
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert data.seed == 2
    assert data.trainer is None


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 4},
        {"learning_rate": 0.1},
        {"weight_decay": 0.0},
        {"seed": 1},
        {"name": "resnet14"},
        {"args": {"a": 1}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_recipe_is_part_of_the_cache_key(changed):
    assert teacher_cache_path(replace(SPEC, **changed), CONFIG) != teacher_cache_path(SPEC, CONFIG)


@pytest.mark.parametrize("changed", [{"batch_size": 16}, {"train_subset": 128}, {"train_subset": None}])
def test_data_are_part_of_the_cache_key(changed):
    assert teacher_cache_path(SPEC, digits(**changed)[1]) != teacher_cache_path(SPEC, CONFIG)
    other = CONFIG | {"class_path": "vision_kd.data.FashionMNIST"}
    assert teacher_cache_path(SPEC, other) != teacher_cache_path(SPEC, CONFIG)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_damaged_cache_file_is_named_with_the_remedy(trainings, content):
    path = teacher_cache_path(SPEC, CONFIG)
    data, config = digits()
    save_student(
        path,
        vision_kd.models.build_classifier(SPEC.model, num_classes=10, in_channels=1, mean=data.mean, std=data.std),
        SPEC.model,
    )
    path.write_bytes(path.read_bytes()[:-4000] if content is None else content)
    with pytest.raises(ValueError, match=rf"(?s){path}.*Delete {path} to train it again"):
        obtain_teacher(SPEC, data, config)
    assert not trainings


def test_multi_process_launch_without_a_teacher_is_refused(trainings):
    with pytest.raises(RuntimeError, match=r"no weights for the teacher resnet8.*--trainer\.devices 1.*checkpoint"):
        obtain_teacher(SPEC, *digits(), launched=True)
    assert not trainings
    obtain_teacher(SPEC, *digits())
    assert obtain_teacher(SPEC, *digits(), launched=True)[1].startswith("from the cache")


LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2},
    "srun": {f"SLURM_{name}": 2 for name in ("NTASKS", "NTASKS_PER_NODE")} | {"SLURM_PROCID": 1, "SLURM_LOCALID": 1},
    "Lightning": {},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_told_from_lightning(digits_args, launcher, monkeypatch):
    """srun sets no WORLD_SIZE."""
    for name, value in (LAUNCHERS[launcher] | {"SLURM_NODEID": 0}).items():
        monkeypatch.setenv(name, str(value))
    trainer = build([*digits_args, "--trainer.devices=2", "--trainer.fast_dev_run=1"]).trainer
    assert launched_from_outside(trainer) == (launcher != "Lightning")


def test_checkpoint_goes_before_cache_and_training(trainings, tmp_path):
    trained, _ = obtain_teacher(SPEC, *digits())
    path = tmp_path / "own.pt"
    with torch.no_grad():
        next(trained.parameters()).add_(1)
    save_student(path, trained, SPEC.model)
    found, origin = obtain_teacher(replace(SPEC, checkpoint=str(path)), *digits())
    assert origin == f"loaded from {path}"
    assert torch.equal(next(found.parameters()), next(trained.parameters()))
    assert len(trainings) == 1


def test_missing_checkpoint_is_an_error_not_a_training(trainings):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        obtain_teacher(replace(SPEC, checkpoint="nowhere.pt"), *digits())
    assert not trainings


def test_a_run_prints_the_teacher_first_and_finds_it_again(digits_args, tmp_path, trainings):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    results = []
    try:
        for name in ("first", "second"):
            cli = build([*digits_args, f"--run_dir={tmp_path / name}", f"--seed_everything={len(results)}"])
            start = len(messages)
            fit = cli.trainer.fit

            def spied(*args, start=start, fit=fit, **kwargs):
                assert any(m.startswith("Teacher resnet8: top-1 ") for m in messages[start:]), messages[start:]
                return fit(*args, **kwargs)

            cli.trainer.fit = spied
            results.append(run(cli).teacher)
    finally:
        logger.removeHandler(handler)
    assert len(trainings) == 1
    assert results[0]["top1"] == results[1]["top1"]
    path = next((cache_root() / "teachers").glob("*.pt"))
    assert results[1]["origin"] == f"from the cache, {path}"
    assert top1(load_classifier(path)) == pytest.approx(results[0]["top1"])
