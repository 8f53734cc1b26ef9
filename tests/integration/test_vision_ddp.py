"""Whole runs on two gloo processes against one process with the doubled batch."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from kd_common.run.errors import NonFiniteLossError
from vision_kd.data import Digits
from vision_kd.fit import build, run
from vision_kd.models import MODELS, load_classifier, save_student
from vision_kd.training.classification import DistillationModule
from vision_kd.training.metrics import accuracy
from vision_kd.training.specs import TeacherSpec
from vision_kd.training.teacher import obtain_teacher

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

VARIANTS = {
    "SGD": ["--config=policies/sgd"],
    "DOT": ["--config=policies/dot", "--model.gsnr_every=2"],
    "DeepKD paper": ["--config=policies/deepkd", "--model.ema_decay=0.5"],
    "DeepKD released": ["--config=policies/deepkd_released", "--model.clip_norm=0.2"],
    "accumulation": ["--config=policies/deepkd", "--model.accumulate=2"],
    "BatchNorm": ["--config=policies/deepkd", "--model.student.name=resnet8"],
}


def tiny(num_classes, in_channels):
    """A network without BatchNorm, whose result does not depend on how a batch is shared out."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 8, 3, stride=2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(72, num_classes),
    )


if "test_ddp_tiny" not in MODELS.names():
    MODELS.register("test_ddp_tiny")(tiny)


def odd_validation(load):
    """Loading with 499 images to validate: a sampler that repeats one for an even share counts it twice."""
    return lambda self, train: tuple(part[: None if train else 499] for part in load(self, train))


def arguments(folder, teacher, batch, extra):
    return [
        f"--run_dir={folder}",
        "--seed_everything=1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=64-true",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--data.batch_size={batch}",
        "--data.val_batch_size=37",
        "--data.train_subset=200",
        "--model.student.name=test_ddp_tiny",
        "--model.teacher.name=resnet8",
        f"--model.teacher.checkpoint={teacher}",
        *extra,
    ]


def distributed_runs(root, teacher):
    """What each of the two processes does; leaves its students and histories in the folder."""
    torch.set_num_threads(1)
    Digits.load = odd_validation(Digits.load)
    found = {}
    for name, extra in VARIANTS.items():
        cli = build(
            [
                *arguments(f"{root}/{name}", teacher, 16, extra),
                "--trainer.devices=2",
                "--trainer.strategy=ddp",
            ]
        )
        result = run(cli)
        found[name] = {
            "state": cli.model.state_dict(),
            "history": result.history,
            "steps": cli.trainer.global_step,
            "teacher": result.teacher.get("top1"),
        }
    torch.save(found, f"{root}/rank{cli.trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE", str(folder))
        network, _ = obtain_teacher(
            TeacherSpec("resnet8", epochs=2), Digits(), {"init_args": {}}, task=DistillationModule
        )
    save_student(folder / "teacher.pt", network, TeacherSpec("resnet8").model)
    return folder / "teacher.pt"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, teacher, run_ranks):
    """Folder of the two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(distributed_runs, folder, str(folder), str(teacher))  # all variants in turn: importing is what costs
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "BatchNorm"])
def test_two_processes_equal_one_with_the_doubled_batch(ranks, teacher, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Digits, "load", odd_validation(Digits.load))
    cli = build(arguments(tmp_path / "single", teacher, 32, VARIANTS[name]))
    result = run(cli)
    for found in (rank[name] for rank in ranks[1]):
        assert found["steps"] == cli.trainer.global_step == (6 if name == "accumulation" else 12)
        for key, value in cli.model.state_dict().items():
            torch.testing.assert_close(found["state"][key], value, rtol=0, atol=1e-12)
        for epoch, expected in zip(found["history"], result.history, strict=True):
            assert {key: epoch[key] for key in expected if key != "seconds"} == pytest.approx(
                {key: value for key, value in expected.items() if key != "seconds"}, rel=1e-6
            )
    assert result.last["top1"] * 499 == pytest.approx(round(result.last["top1"] * 499), abs=1e-3)
    assert ranks[1][0][name]["teacher"] == result.teacher["top1"]


def test_batch_norm_statistics_agree_over_the_ranks(ranks, monkeypatch):
    folder, (first, second) = ranks
    for key, value in first["BatchNorm"]["state"].items():
        assert torch.equal(value, second["BatchNorm"]["state"][key]), key
    assert first["BatchNorm"]["history"][-1]["top1"] == second["BatchNorm"]["history"][-1]["top1"]

    monkeypatch.setattr(Digits, "load", odd_validation(Digits.load))
    data = Digits()
    data.setup("validate")
    found = accuracy(load_classifier(folder / "BatchNorm/student_last.pt"), data.val_dataloader(), 10, "cpu")
    assert found["top1"] == pytest.approx(first["BatchNorm"]["history"][-1]["top1"], abs=1e-6)


def test_one_process_writes(ranks):
    folder = ranks[0] / "SGD"
    names = sorted(path.name for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    assert names == [
        "best.ckpt",
        "config.yaml",
        "hparams.yaml",
        "last.ckpt",
        "metrics.csv",
        "student_best.pt",
        "student_last.pt",
    ]
    assert len(list(folder.glob("events.out.tfevents*"))) == 1
    assert "Teacher resnet8" in (ranks[0] / "output0").read_text()
    assert "Teacher resnet8" not in (ranks[0] / "output1").read_text()


class Poison(pl.Callback):
    """Makes one batch of one rank NaN."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (1, 2):
            batch[0]["weak"].fill_(torch.nan)


def poisoned_run(root):
    torch.set_num_threads(1)
    arguments = [
        "--config=methods/vanilla",
        f"--run_dir={root}/run",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--data.batch_size=16",
        "--data.train_subset=200",
        "--model.student.name=test_ddp_tiny",
    ]
    cli = build(arguments)
    cli.trainer.callbacks.append(Poison())
    try:
        run(cli)
    except NonFiniteLossError as error:
        Path(f"{root}/rank{cli.trainer.global_rank}").write_text(str(error))


def test_a_loss_that_is_nan_on_one_rank_ends_all_ranks(tmp_path, run_ranks):
    run_ranks(poisoned_run, tmp_path, str(tmp_path))
    for rank in range(2):
        assert "epoch 0, batch 2" in (tmp_path / f"rank{rank}").read_text()
