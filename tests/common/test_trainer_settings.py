"""Settings of the trainer that a run cannot respect are refused by name; the others pass."""

from datetime import timedelta

import lightning.pytorch as pl
import pytest
from lightning.pytorch import callbacks

from kd_common.run.rehearsal import check_monitors
from kd_common.run.trainer_settings import check_batches, check_precision_and_length, check_trainer, limited


class Automatic(pl.LightningModule):
    pass


class Manual(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def trainer(**settings):
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | settings
    return pl.Trainer(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"limit_val_batches": 0}, r"trainer\.limit_val_batches"),
        ({"limit_train_batches": 0.0}, r"trainer\.limit_train_batches"),
        ({"overfit_batches": 2}, r"trainer\.overfit_batches"),
        ({"min_epochs": 3}, r"trainer\.min_epochs 3"),
        ({"max_steps": 5, "min_steps": 6}, r"trainer\.min_steps 6"),
        ({"check_val_every_n_epoch": 0}, r"trainer\.check_val_every_n_epoch"),
        ({"val_check_interval": 0}, r"trainer\.val_check_interval"),
        ({"strategy": "ddp_spawn", "devices": 2}, r"trainer\.strategy"),
        ({"callbacks": [callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
        ({"callbacks": [callbacks.StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging"),
        ({"callbacks": [callbacks.WeightAveraging()]}, "WeightAveraging"),
        ({"callbacks": [callbacks.OnExceptionCheckpoint(".")]}, "OnExceptionCheckpoint .*save_on_exception"),
        ({"callbacks": [callbacks.BatchSizeFinder()]}, r"BatchSizeFinder .*data\.batch_size"),
        ({"callbacks": [callbacks.LearningRateFinder()]}, r"LearningRateFinder .*model\.learning_rate"),
        ({"callbacks": [callbacks.LearningRateMonitor()]}, r"LearningRateMonitor .*trainer\.logger"),
    ],
)
def test_what_cannot_be_respected_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        check_trainer(trainer(**settings), Automatic())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("16-mixed", 2, -1), "precision"),
        ((16, 2, -1), "precision"),
        (("32-true", 0, 5), "max_epochs"),
        (("32-true", -1, -1), "max_epochs"),
        (("32-true", None, -1), "max_epochs"),
        (("32-true", 2, 0), "max_steps"),
    ],
)
def test_fp16_and_an_unknown_length_are_refused(settings, named):
    with pytest.raises(ValueError, match=rf"trainer\.{named}"):
        check_precision_and_length(*settings)


def test_barebones_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.barebones"):
        check_trainer(pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1), Automatic())


def test_time_intervals_are_for_automatic_optimisation():
    timed = trainer(callbacks=[callbacks.ModelCheckpoint(train_time_interval=timedelta(seconds=1))])
    check_trainer(timed, Automatic())
    with pytest.raises(ValueError, match="train_time_interval"):
        check_trainer(timed, Manual())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": -1, "max_steps": 5},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"limit_val_batches": 0.5, "limit_train_batches": 1, "num_sanity_val_steps": 0},
        {"precision": "bf16-mixed", "deterministic": True, "detect_anomaly": True, "inference_mode": False},
        {"max_time": "00:00:01:00", "enable_checkpointing": False, "reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": "00:00:00:01"},
        {"callbacks": [callbacks.EarlyStopping("val/loss"), callbacks.Timer()]},
        {"fast_dev_run": True, "callbacks": [callbacks.LearningRateMonitor()]},
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_others_pass(settings):
    check_trainer(trainer(**settings), Automatic())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"limit_val_batches": 0.1}, r"trainer\.limit_val_batches 0\.1 of 4"),
        ({"limit_train_batches": 0.1}, r"trainer\.limit_train_batches 0\.1 of 8"),
        ({"val_check_interval": 9}, r"trainer\.val_check_interval 9 .* 8 batches"),
        ({"val_check_interval": 3, "limit_train_batches": 2}, r"trainer\.val_check_interval 3 .* 2 batches"),
    ],
)
def test_limits_that_leave_nothing_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        check_batches(trainer(**settings), 8, 4)


def test_batches_under_a_limit():
    check_batches(trainer(val_check_interval=20, check_val_every_n_epoch=None), 8, 4)
    check_batches(trainer(val_check_interval="00:00:00:01"), 8, 4)
    assert [limited(10, limit) for limit in (1.0, 0.25, 3, 30)] == [10, 2, 3, 10]


def test_a_metric_that_is_never_logged_is_refused():
    watching = trainer(callbacks=[callbacks.EarlyStopping("val_loss")])
    with pytest.raises(ValueError, match=r"EarlyStopping watches val_loss.* val/loss"):
        check_monitors(watching, ["val/loss"])
    check_monitors(watching, ["val_loss"])
