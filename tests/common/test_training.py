"""Runs of a toy system, resumed from a checkpoint of every hook under many settings, against the undisturbed run."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from kd_common.run.loading import WorkerLoader
from kd_common.run.training import FitTrainer, TrainingModule
from kd_common.schedules import CosineDecay


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return torch.full((3,), float(row))


class Order(DistributedSampler):
    """The rows in an order that depends on the epoch, from ``first`` on."""

    first = 0

    def __iter__(self):
        first, self.first = self.first, 0
        return iter(list(super().__iter__())[first:])


class Data(pl.LightningDataModule):
    def __init__(self, workers=0):
        super().__init__()
        self.workers = workers

    def train_dataloader(self):
        return WorkerLoader(Rows(), 2, sampler=Order(Rows(), 1, 0, seed=3), num_workers=self.workers)

    def val_dataloader(self):
        return WorkerLoader(Rows(), 4, sampler=Order(Rows(), 1, 0, shuffle=False))


class Toy(TrainingModule):
    """Draws at random in every step, and remembers which rows it saw."""

    metric, export_name = "weight", "toy_{}"

    def export(self, path):
        """Write nothing."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.seed, self.lr_schedule = 5, CosineDecay()
        self.network = nn.Linear(3, 1)
        nn.init.ones_(self.network.weight), nn.init.zeros_(self.network.bias)
        self.seen, self.validations = [], 0

    def build_optimizer(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.epoch, batch_idx, batch[:, 0].tolist()))
        loss = (self.network(batch) + torch.rand(())).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self._touched = True
            optimizer.step()
            self.lr_schedulers().step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self._touched = True

    def validation_step(self, batch, batch_idx):
        torch.rand(())  # validation may draw as well

    def on_validation_epoch_end(self):
        self.log("val/weight", self.network.weight.sum())
        if not self.trainer.sanity_checking:
            self.remember({"weight": self.network.weight.sum().item()})


class Everywhere(pl.Callback):
    """Writes a checkpoint in every hook between two batches."""

    def __init__(self, folder):
        self.folder, self.names = folder, []

    def save(self, trainer, hook):
        if self.folder is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.names.append(f"{len(self.names):02} {hook}, epoch {trainer.current_epoch}, step {trainer.global_step}")
            trainer.save_checkpoint(self.folder / f"{self.names[-1]}.ckpt")

    def on_train_epoch_start(self, trainer, module):
        self.save(trainer, "on_train_epoch_start")

    def on_train_batch_start(self, trainer, *_):
        self.save(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "on_train_batch_end")

    def on_validation_start(self, trainer, module):
        self.save(trainer, "on_validation_start")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "on_train_epoch_end")

    def on_train_end(self, trainer, module):
        self.save(trainer, "on_train_end")


@pytest.fixture(autouse=True)
def _folder_of_the_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(settings, callback=None, checkpoint=None, manual=False, workers=0):
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False, **settings}
    module = Toy(manual)
    trainer = FitTrainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
        **settings,
    )
    trainer.fit(module, datamodule=Data(workers), ckpt_path=checkpoint, weights_only=True)
    return trainer, module


def end(trainer, module):
    """What two runs are compared by."""
    state = [value.tolist() for value in module.state_dict().values()]
    optimizer = [value.tolist() for value in trainer.optimizers[0].state_dict()["state"][0].values()]
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in module.history]
    return state, optimizer, history, trainer.global_step, module.epoch


SETTINGS = {
    "plain": {},
    "sanity check": {"num_sanity_val_steps": 1},
    "validation inside": {"val_check_interval": 2},
    "validation at three quarters": {"val_check_interval": 0.75},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "steps": {"max_steps": 6, "val_check_interval": 3},
    "steps, whole epochs": {"max_steps": 8},
    "across epochs": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "limited": {"limit_train_batches": 3, "check_val_every_n_epoch": 2},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 2},
}
AUTOMATIC = {
    "accumulated": {"accumulate_grad_batches": 3, "val_check_interval": 2},
    "accumulated, limited": {"accumulate_grad_batches": 2, "limit_train_batches": 3},
}
CASES = [*((name, manual) for name in SETTINGS for manual in (False, True)), *((name, False) for name in AUTOMATIC)]


@pytest.mark.parametrize(("name", "manual"), CASES)
@pytest.mark.quick("across epochs-True", "validation inside-True", "reloaded-False", "accumulated-False")
def test_resumed_from_any_hook_equals_undisturbed(name, manual, tmp_path):
    settings = (SETTINGS | AUTOMATIC)[name]
    callback = Everywhere(tmp_path)
    trainer, module = fit(settings, callback, manual=manual)
    expected, seen = end(trainer, module), module.seen
    assert end(*fit(settings, manual=manual)) == expected  # writing checkpoints changes nothing
    assert [row["step"] for row in module.history][-1] == trainer.global_step
    for name in callback.names:
        resumed = fit(settings, checkpoint=tmp_path / f"{name}.ckpt", manual=manual)
        assert end(*resumed) == expected, name
        assert resumed[1].seen == seen[len(seen) - len(resumed[1].seen) :], name


def test_the_first_update_follows_the_schedule_too():
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module_schedule = CosineDecay(warmup_epochs=1.0, warmup_start=0.25)
    made = Toy.__init__

    def warm(self, manual=False):
        made(self, manual)
        self.lr_schedule = module_schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "__init__", warm)
        fit({"max_epochs": 2}, Rates())
    assert rates == pytest.approx([0.1 * module_schedule(step / 4, 2.0) for step in range(8)])
    assert rates[0] == pytest.approx(0.025)


def test_draws_of_a_step_depend_on_seed_epoch_batch_and_rank():
    def draw(seed=5, epoch=0, batch=0, rank=0):
        module = Toy(manual=True)
        module.seed = seed
        loop = SimpleNamespace(epoch_loop=SimpleNamespace())
        module.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, global_step=0, fit_loop=loop)
        module.on_train_batch_start(None, batch)
        return torch.rand(()).item()

    assert draw() == draw()
    places = [{}, {"seed": 6}, {"epoch": 1}, {"batch": 1}, {"rank": 1}]
    assert len({draw(**place) for place in places}) == len(places)


def test_a_loader_inside_an_epoch_of_other_data_is_refused():
    loader, other = Data().train_dataloader(), WorkerLoader(Rows(), 4, sampler=Order(Rows(), 1, 0, seed=3))
    next(iter(loader))
    with pytest.raises(ValueError, match="1 batches into epoch 0 with other data"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("manual", [False, True])
def test_an_error_between_two_batches_leaves_a_checkpoint_to_resume_from(tmp_path, manual):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                raise RuntimeError("stop")

    expected = end(*fit({}, manual=manual))
    keep = ModelCheckpoint(tmp_path, "stopped", save_on_exception=True, every_n_epochs=10)
    with pytest.raises(RuntimeError, match="stop"):
        fit({"enable_checkpointing": True}, [Stop(), keep], manual=manual)
    assert end(*fit({}, checkpoint=tmp_path / "stopped.ckpt", manual=manual)) == expected


def test_an_error_within_an_update_leaves_one_that_is_refused(tmp_path):
    class Broken(Toy):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            raise RuntimeError("stop")

    trainer = FitTrainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint(tmp_path, "stopped", save_on_exception=True)],
    )
    module = Broken()
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        fit({}, checkpoint=tmp_path / "stopped.ckpt")
