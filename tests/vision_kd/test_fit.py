"""Whole runs on the embedded digits: results, files, replay, seeds, divergence, bad input."""

import csv
import math
import re

import lightning.pytorch as pl
import pytest
import torch

from kd_common.run.errors import NonFiniteLossError
from kd_common.schedules import TopKSchedule
from vision_kd.data import Digits
from vision_kd.fit import build, main, run
from vision_kd.models import MODELS, load_classifier
from vision_kd.training.metrics import accuracy
from vision_kd.training.rehearsal import limited_validation, rehearse


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


def train(args, *extra):
    """Build and run; the parsed run and its result."""
    cli = build([*args, *extra])
    return cli, run(cli)


@pytest.fixture
def sgd_args(digits_args):
    """A run without a teacher, the quickest there is."""
    return [*digits_args, "--config=methods/vanilla"]


class Poison(pl.Callback):
    """Makes the student infinite in epoch 1, before or after a batch."""

    def __init__(self, batch_idx, *, after=False):
        self.batch_idx, self.after = batch_idx, after

    def poison(self, trainer, module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, self.batch_idx):
            with torch.no_grad():
                next(module.student.parameters()).fill_(torch.inf)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.after:
            self.poison(trainer, module, batch_idx)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.after:
            self.poison(trainer, module, batch_idx)


# ------------------------------------------------------------------------------------------------------ whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with everything switched on, by the command line's own entry point."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE", str(folder / "cache"))
        args = [
            f"--run_dir={folder / 'run'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=3",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_progress_bar=false",
            "--data.batch_size=32",
            "--data.train_subset=256",
            "--model.teacher.name=resnet8",
            "--model.teacher.epochs=4",
            "--model.ema_decay=0.5",
            "--model.clip_norm=5",
            "--model.accumulate=2",
        ]
        cli = build(args)
        yield folder, cli, run(cli)


def test_result(finished):
    folder, cli, result = finished
    assert 0.15 < result.teacher["top1"] <= result.teacher["top5"] <= 1
    assert result.teacher["origin"].startswith("trained for 4 epochs")
    assert [epoch["epoch"] for epoch in result.history] == [0, 1, 2]
    assert result.last == result.history[-1]
    assert result.best["top1"] == max(epoch["top1"] for epoch in result.history)
    assert set(result.gsnr) == {"task", "target", "nontarget"}
    assert all(value > 0 for value in result.gsnr.values())
    assert result.k == TopKSchedule(10, 12, k_start=0.05, k_opt=0.5, phase_ends=(0.3, 0.6))(11) == 8
    assert result.seconds_per_epoch > 0
    assert result.parameters == {"student": 77_754, "teacher": 77_754}
    assert result.run_dir == folder / "run"
    assert cli.trainer.global_step == 3 * 4


@pytest.mark.parametrize("which", ["last", "best"])
def test_student_files_load_with_plain_pytorch_and_reach_the_reported_accuracy(finished, which):
    _, cli, result = finished
    path = result.run_dir / f"student_{which}.pt"
    network = MODELS.get("resnet8")(num_classes=10, in_channels=1)
    saved = torch.load(path, weights_only=True)
    network.load_state_dict(saved["model"])

    data = Digits()
    data.setup("validate")
    found = accuracy(load_classifier(path), data.val_dataloader(), 10, "cpu")
    expected = getattr(result, which)
    assert found == pytest.approx({"top1": expected["top1"], "top5": expected["top5"]})
    assert saved["meta"]["epoch"] == expected["epoch"]
    if which == "last":
        for key, value in cli.model.inference_model.network.state_dict().items():
            assert torch.equal(saved["model"][key], value)


def test_checkpoints(finished):
    _, cli, result = finished
    folder = result.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    assert last["epoch"] == 2
    assert not any("teacher" in key for key in last["state_dict"])
    assert last["history"] == result.history
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert best["history"][-1] == result.best
    for key, value in cli.model.state_dict().items():
        assert torch.equal(last["state_dict"][key], value)


def test_metrics_file(finished):
    _, _, result = finished
    with (result.run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def column(name):
        return [float(row[name]) for row in rows if row[name]]

    assert column("train/lr") == pytest.approx([0.05 * 0.5 * (1 + math.cos(math.pi * s / 12)) for s in range(12)])
    k = column("train/k")
    assert k[0] == 1
    assert k == sorted(k)
    assert len(column("val/top1")) == 3
    for name in ("task", "target", "nontarget"):
        assert len(column(f"train/{name}")) == 12
        assert len(column(f"grad_norm/{name}")) == 6
        assert len(column(f"gsnr/{name}")) == 3
    assert all(-1 <= value <= 1 for value in column("grad_cosine/target_task"))


def test_saved_configuration_replays_the_run(finished, monkeypatch):
    folder, cli, result = finished
    monkeypatch.setenv("KD_CACHE", str(folder / "cache"))
    replayed, again = train([f"--config={result.run_dir / 'config.yaml'}", f"--run_dir={folder / 'replay'}"])
    assert torch.equal(weights(replayed.model), weights(cli.model))
    assert again.teacher["origin"].startswith("from the cache")
    assert again.last["loss"] == result.last["loss"]


def test_table(digits_args, capsys, tmp_path):
    main([*digits_args, "--trainer.max_epochs=1"])
    printed = capsys.readouterr().out
    for part in ("KD with DeepKD", "teacher resnet8", "student resnet8, best epoch (1)", "77,754", "k reached"):
        assert part in printed
    for name in ("task", "target", "nontarget"):
        assert f"GSNR of {name}" in printed
    for path in ("student_{last,best}.pt", "checkpoints/last.ckpt", "metrics.csv", "config.yaml"):
        assert str(tmp_path / "run" / path) in printed


# ---------------------------------------------------------------------------------------------- seeds and precision


def test_the_seed_decides_the_run(sgd_args, tmp_path):
    first, second, other = (
        weights(train(sgd_args, f"--seed_everything={seed}", f"--run_dir={tmp_path / name}")[0].model)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-2)


def test_a_random_seed_is_refused(sgd_args, capsys):
    with pytest.raises(SystemExit):
        build([*sgd_args, "--seed_everything=true"])
    assert "a run is resumed from its seed" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
@pytest.mark.quick("bf16-mixed-dtype0")
def test_precisions(digits_args, precision, dtype):
    cli, result = train(digits_args, f"--trainer.precision={precision}", "--trainer.max_epochs=1")
    assert weights(cli.model).dtype == dtype
    assert 0 < result.last["loss"] < 3


@pytest.mark.parametrize("subset", [128, None])
def test_a_batch_beyond_the_training_set_is_refused_before_a_teacher_is_trained(digits_args, monkeypatch, subset):
    monkeypatch.setattr(
        "vision_kd.training.task.obtain_teacher",
        lambda *args, **kwargs: pytest.fail("a teacher was trained"),
    )
    images = f"{subset or 1297:,}"
    with pytest.raises(ValueError, match=rf"^data\.batch_size 10000: the {images} training images do not fill"):
        train(digits_args, f"--data.train_subset={subset or 'null'}", "--data.batch_size=10000")


def test_loss_scaling_is_refused_before_anything_runs(digits_args):
    with pytest.raises(ValueError, match="bf16-mixed or 32-true"):
        build([*digits_args, "--trainer.precision=16-mixed"])


# ---------------------------------------------------------------------------------------------------- divergence


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("poison", [Poison(2), Poison(3, after=True)], ids=["loss", "last update"])
@pytest.mark.quick("loss")
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(sgd_args, tmp_path, poison):
    cli = build([*sgd_args, "--trainer.max_epochs=3"])
    cli.trainer.callbacks.append(poison)
    last = tmp_path / "run/checkpoints/last.ckpt"
    named = "validation loss is nan at epoch 1" if poison.after else "epoch 1, batch 2"
    with pytest.raises(NonFiniteLossError, match=rf"(?s){named}.*{last}"):
        run(cli)
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    student = torch.load(tmp_path / "run/student_last.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in student.values())

    resumed, result = train(sgd_args, "--trainer.max_epochs=3", f"--ckpt_path={last}")
    assert [epoch["epoch"] for epoch in result.history] == [0, 1, 2]
    assert weights(resumed.model).isfinite().all()


class Spoil(pl.Callback):
    """Makes the student answer class 0 throughout, after the last update of epoch 1."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and trainer.is_last_batch:
            with torch.no_grad():
                module.student.network.fc.bias[0] = 1e4


def test_best_and_last_are_told_apart(sgd_args, tmp_path):
    cli = build([*sgd_args, "--data.train_subset=null"])
    cli.trainer.callbacks.append(Spoil())
    result = run(cli)
    assert result.best["top1"] > 0.2 > result.last["top1"]
    for name, epoch in (("best", 0), ("last", 1)):
        checkpoint = torch.load(tmp_path / f"run/checkpoints/{name}.ckpt", weights_only=True)
        student = torch.load(tmp_path / f"run/student_{name}.pt", weights_only=True)
        assert (checkpoint["epoch"], student["meta"]["epoch"]) == (epoch, epoch)
        assert torch.equal(checkpoint["state_dict"]["student.network.fc.bias"], student["model"]["fc.bias"])
        assert bool(student["model"]["fc.bias"][0] > 1e3) == (name == "last")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty", "ignore:The dirpath has changed")
@pytest.mark.parametrize("folder", ["run", "other"])
@pytest.mark.quick("run")
def test_resumed_before_the_best_epoch_of_its_run_the_best_student_is_of_an_epoch_that_counts(
    sgd_args, tmp_path, folder
):
    args = [*sgd_args, "--data.train_subset=null"]
    train(args, "--trainer.max_epochs=1")
    best = tmp_path / "run/student_best.pt"
    first = torch.load(best, weights_only=True)
    later = {"model": {**first["model"], "fc.bias": first["model"]["fc.bias"] + 1}}
    torch.save(later | {"meta": first["meta"] | {"epoch": 7, "top1": 1.0}}, best)  # as the run went on from there

    last = tmp_path / "run/checkpoints/last.ckpt"
    cli = build([*args, f"--run_dir={tmp_path / folder}", f"--ckpt_path={last}"])
    cli.trainer.callbacks.append(Spoil())
    assert run(cli).best["epoch"] == 0
    found = torch.load(tmp_path / folder / "student_best.pt", weights_only=True)
    assert found["meta"] == first["meta"]
    assert torch.equal(found["model"]["fc.bias"], first["model"]["fc.bias"])
    kept = torch.load(tmp_path / "run" / {"run": "student_best_1.pt", "other": best.name}[folder], weights_only=True)
    assert kept["meta"]["epoch"] == 7


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.topk.k_start=10"], r"k_start.* \[1, 9\]"),
        (["--model.method=Vanilla"], "model.topk masks the non-target term"),
        (["--model.method=Vanilla", "--model.topk=null"], "treats the gradient of target, nontarget apart"),
        (["--model.policy=DeepKD", "--model.policy.delta=0.2"], r"outside \[0, 1\)"),
        (["--trainer.max_epochs=null"], r"trainer\.max_epochs"),
        (["--model.student.name=resnet9"], "unknown model 'resnet9'; did you mean"),
        (["--model.learnin_rate=1"], "learnin_rate: .* did you mean learning_rate"),
        (["--model.student.nme=resnet8"], r"--model\.student\.nme: [^?]*; did you mean name\?\s*2$"),
        (["--model.gsnr_every=null"], r"model\.gsnr_every: must not be null"),
        (["--model.ema_decay=1"], r"model\.ema_decay must lie in \[0, 1\)"),
        (["--model.teacher.epochs=0"], r"model\.teacher\.epochs must be >= 1"),
    ],
)
def test_bad_settings_fail_before_anything_runs(digits_args, capsys, extra, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        build([*digits_args, *extra])
    said = capsys.readouterr().err + str(caught.value)
    assert re.search(message, said, re.S), said


def test_a_method_without_its_teacher_is_refused(digits_args):
    with pytest.raises(ValueError, match=r"KD needs model\.teacher"):
        build([*(arg for arg in digits_args if "teacher" not in arg), "--model.teacher=null"])


def test_a_checkpoint_of_other_classes_names_both_sides(digits_args, finished):
    saved = finished[2].run_dir / "student_last.pt"
    state = torch.load(saved, weights_only=True)["model"]
    other = saved.with_name("seven_classes.pt")
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:7], state["fc.bias"][:7]
    torch.save({"model": state}, other)
    cli = build([*digits_args, f"--model.teacher.checkpoint={other}"])
    with pytest.raises(ValueError, match=r"(?s)seven_classes\.pt has 7 classes.*10 classes"):
        run(cli)


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_a_run_without_validation_is_refused_before_anything_is_trained(sgd_args):
    with pytest.raises(ValueError, match=r"trainer\.limit_val_batches"):
        build([*sgd_args, "--trainer.limit_val_batches=0"])


def test_the_last_student_is_the_one_after_the_last_update(sgd_args, tmp_path):
    cli, result = train(sgd_args, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2")
    assert [(epoch["epoch"], epoch["step"]) for epoch in result.history] == [(1, 8), (2, 12)]
    saved = torch.load(tmp_path / "run/student_last.pt", weights_only=True)["model"]
    for name, value in cli.model.student.network.state_dict().items():
        assert torch.equal(saved[name], value)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.parametrize("learning_rate", [0.05, 1e8])
def test_a_dry_step_leaves_the_run_as_it_was(sgd_args, learning_rate):
    """Under the second one a step on two images would end in NaN, which says nothing about the settings' validity."""
    cli = build([*sgd_args, f"--model.learning_rate={learning_rate}"])
    cli.datamodule.check_batch(1)
    weights = {name: value.clone() for name, value in cli.model.state_dict().items()}
    state, files = torch.get_rng_state(), sorted(cli.run_dir.rglob("*"))
    rehearse(cli.model, cli.datamodule, cli.trainer, cli.run_dir)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in cli.model.state_dict().items())
    assert sorted(cli.run_dir.rglob("*")) == files
    assert cli.model.history == []


def test_what_fails_at_the_end_fails_before_the_teacher_is_trained(digits_args, monkeypatch):
    """Here the export; the teacher would be trained first."""

    def full(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("vision_kd.training.rehearsal.save_student", full)
    monkeypatch.setattr(
        "vision_kd.training.task.obtain_teacher", lambda *_, **__: pytest.fail("the teacher came first")
    )
    with pytest.raises(OSError, match="no room"):
        run(build(digits_args))


def test_the_teacher_is_measured_on_as_many_images_as_the_student(sgd_args):
    cli = build([*sgd_args, "--trainer.limit_val_batches=2", "--data.val_batch_size=10"])
    cli.datamodule.setup("validate")
    limited = limited_validation(cli.datamodule, cli.trainer).val_dataloader()
    assert [len(target) for _, target in limited] == [10, 10]


def test_a_run_that_max_steps_ends_inside_an_epoch_is_validated(sgd_args):
    cli, result = train(sgd_args, "--trainer.max_steps=2")
    assert cli.trainer.global_step == 2
    assert len(result.history) == 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_second_run_in_the_same_folder_replaces_the_checkpoints(sgd_args, tmp_path):
    train(sgd_args, "--seed_everything=1")
    cli, result = train(sgd_args, "--seed_everything=2")
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    last = torch.load(folder / "last.ckpt", weights_only=True)
    for key, value in cli.model.state_dict().items():
        assert torch.equal(last["state_dict"][key], value)
    assert last["history"] == result.history


def test_open_classes_are_resolved_in_the_configuration(digits_args):
    init = build(digits_args).config["model"]["init_args"]
    assert init["method"]["class_path"] == "vision_kd.methods.kd.KD"
    assert init["policy"]["class_path"] == "vision_kd.policies.DeepKD"
    assert init["lr_schedule"]["class_path"] == "kd_common.schedules.CosineDecay"
    assert init["policy"]["init_args"]["preset"] == "paper"


@pytest.mark.parametrize(
    ("option", "hint"),
    [("accumulate_grad_batches=2", "model.accumulate"), ("gradient_clip_val=1.0", "model.clip_norm")],
)
def test_trainer_options_that_miss_component_gradients_name_ours(digits_args, option, hint):
    with pytest.raises(ValueError, match=hint):
        build([*digits_args, f"--trainer.{option}"])


def test_a_resumed_run_keeps_its_own_settings_and_refuses_others(digits_args, tmp_path):
    first = [*digits_args, "--config=methods/dkd_short", "--trainer.max_epochs=1"]
    run(build(first))
    last = f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"

    cli = build([last, "--trainer.max_epochs=2"])
    assert type(cli.model.method).__name__ == "DKD"
    assert [epoch["epoch"] for epoch in run(cli).history] == [0, 1]
    with pytest.raises(ValueError, match=r"model\.learning_rate was 0\.05, now 0\.001"):
        build([last, "--model.learning_rate=0.001"])
