"""A small network without BatchNorm, batches of random images, and a bare loop around the training module."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from vision_kd.models import MODELS, Classifier, ModelSpec
from vision_kd.training.classification import DistillationModule
from vision_kd.training.specs import TeacherSpec

CLASSES, SIZE = 6, 4
MEAN, STD = (0.4,), (0.3,)


@MODELS.register("test_tiny")
class Tiny(nn.Sequential):
    """Two layers on flattened images of 4 x 4 pixels."""

    def __init__(self, num_classes, in_channels, width=8):
        super().__init__(
            nn.Flatten(), nn.Linear(in_channels * SIZE**2, width), nn.Tanh(), nn.Linear(width, num_classes)
        )


class Toy:
    """What the module tests share; every method is a plain function of its arguments."""

    classes = CLASSES

    @staticmethod
    def classifier(classes=CLASSES, width=8):
        return Classifier(Tiny(classes, 1, width), MEAN, STD, classes)

    @staticmethod
    def module(teacher=True, **settings):
        module = DistillationModule(
            ModelSpec("test_tiny"),
            num_classes=CLASSES,
            in_channels=1,
            mean=MEAN,
            std=STD,
            teacher=TeacherSpec("test_tiny"),
            **settings,
        )
        if teacher:
            module.attach_teacher(Toy.classifier(width=12))
        return module

    @staticmethod
    def batches(*sizes, view="weak"):
        return [
            ({view: torch.rand(size, 1, SIZE, SIZE, dtype=torch.float64)}, torch.randint(CLASSES, (size,)))
            for size in sizes
        ]

    @staticmethod
    def train(module, batches, epochs=1, val=None, logger=False, callbacks=None, **trainer):
        settings = {"precision": "64-true", "accelerator": "cpu", "enable_progress_bar": False} | trainer
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **settings,
        )
        train, val = (DataLoader(b, batch_size=None) for b in (batches, val or Toy.batches(2, view="clean")))
        trainer.fit(module, train, val)
        return trainer


@pytest.fixture
def toy():
    return Toy


@pytest.fixture
def digits_args(tmp_path):
    """Command line of a run of a second on 128 digits, written to tmp_path / "run"."""
    return [
        f"--run_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--data.batch_size=32",
        "--data.train_subset=128",
        "--model.student.name=resnet8",
        "--model.teacher.name=resnet8",
        "--model.teacher.epochs=1",
    ]
