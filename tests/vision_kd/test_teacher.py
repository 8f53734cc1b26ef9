"""Obtaining a teacher: trained once, cached under everything that decides its weights, refused when unusable."""

import importlib
import linecache
import logging
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import SIGTERMException

import vision_kd.training.teacher
from kd_common.files import cache_root
from kd_common.run.errors import NonFiniteLossError
from vision_kd.data import Digits, ImageDataModule, ImageFolder, digest
from vision_kd.fit import build, run
from vision_kd.models import load_classifier, save_student
from vision_kd.training.classification import DistillationModule
from vision_kd.training.metrics import accuracy
from vision_kd.training.specs import TeacherSpec
from vision_kd.training.teacher import launched_from_outside

SPEC = TeacherSpec("resnet8", epochs=3)
obtain_teacher = partial(vision_kd.training.teacher.obtain_teacher, task=DistillationModule)
teacher_cache_path = partial(vision_kd.training.teacher.teacher_cache_path, task=DistillationModule)
CONFIG = {"class_path": "vision_kd.data.Digits", "init_args": {"batch_size": 32, "seed": 0, "train_subset": 256}}


def digits(**changed):
    """The DataModule of CONFIG, with changed arguments, and its configuration."""
    arguments = CONFIG["init_args"] | changed
    return Digits(**arguments), CONFIG | {"init_args": arguments}


def cached(spec=SPEC, **changed):
    """Where the teacher on these digits is kept."""
    return teacher_cache_path(spec, *digits(**changed))


@pytest.fixture
def trainings(monkeypatch):
    """Counts how often a teacher is trained."""
    calls, train = [], vision_kd.training.teacher.train_teacher

    def counted(*args):
        calls.append(args)
        return train(*args)

    monkeypatch.setattr(vision_kd.training.teacher, "train_teacher", counted)
    return calls


def top1(classifier):
    data = Digits()
    data.setup("validate")
    return accuracy(classifier, data.val_dataloader(), 10, "cpu")["top1"]


def test_trained_once_then_read_from_the_cache(trainings):
    first, origin = obtain_teacher(SPEC, *digits())
    path = cached()
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
    assert cached(seed=2) == cached()
    assert obtain_teacher(SPEC, data, config)[1].startswith("from the cache")
    cached().unlink()
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
        {"warmup_epochs": 1.0},
        {"clip_norm": 1.0},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_recipe_is_part_of_the_cache_key(changed):
    assert cached(replace(SPEC, **changed)) != cached()


@pytest.mark.parametrize("changed", [{"batch_size": 16}, {"train_subset": 128}, {"train_subset": None}])
def test_settings_of_the_data_are_part_of_the_cache_key(changed):
    assert cached(**changed) != cached()


def test_one_pixel_of_the_data_is_part_of_the_cache_key():
    data, config = digits()
    data.setup("fit")
    data._splits[True][0][17, 0, 3, 3] ^= 1
    assert teacher_cache_path(SPEC, data, config) != cached()


@pytest.mark.parametrize(
    ("name", "value"),
    [("class_names", tuple("1023456789")), ("mean", (0.5,)), ("std", (0.5,)), ("image_size", 9)],
)
def test_what_a_network_is_told_of_the_data_is_part_of_the_cache_key(name, value):
    data, config = digits()
    setattr(data, name, value)
    assert teacher_cache_path(SPEC, data, config) != cached()


def test_the_code_of_an_own_network_is_part_of_the_cache_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "from vision_kd.models import MODELS\n"
        "MODELS._entries.pop('test_own', None)\n"
        "@MODELS.register('test_own')\n"
        "def own(num_classes, in_channels):\n"
        "    return MODELS.get('resnet8')(num_classes=num_classes, in_channels=in_channels)\n"
    )
    paths = []
    for text in (source, source, source + "# changed\n"):
        (tmp_path / "own_network.py").write_text(text)
        linecache.clearcache()
        sys.modules.pop("own_network", None)
        importlib.import_module("own_network")
        paths.append(cached(replace(SPEC, name="test_own")))
    assert paths[0] == paths[1] != paths[2]


def folder(root, shift=0, names=("a", "b")):
    """Two classes of four pictures in each split, whose files all have one size."""
    for split in ("train", "val"):
        for label, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = torch.full((3, 8, 8), 40 + 100 * label + number + shift, dtype=torch.uint8)
                torchvision.utils.save_image(pixels / 255, root / split / name / f"{number}.bmp")
    config = {"class_path": "vision_kd.data.ImageFolder", "init_args": {"root": str(root), "image_size": 8}}
    return ImageFolder(str(root), 8, num_workers=0, batch_size=4), config


def test_a_teacher_is_known_by_the_pictures_not_by_their_place(tmp_path):
    one = teacher_cache_path(SPEC, *folder(tmp_path / "one"))
    assert teacher_cache_path(SPEC, *folder(tmp_path / "copy")) == one
    assert teacher_cache_path(SPEC, *folder(tmp_path / "brighter", shift=1)) != one
    assert teacher_cache_path(SPEC, *folder(tmp_path / "renamed", names=("b", "c"))) != one
    folder(tmp_path / "edited")
    shutil.copy(tmp_path / "one/train/b/0.bmp", tmp_path / "edited/train/a/3.bmp")
    assert teacher_cache_path(SPEC, *reopened(tmp_path / "edited")) != one
    (tmp_path / "one/val/a/0.bmp").unlink()  # which nothing learns from
    assert teacher_cache_path(SPEC, *reopened(tmp_path / "one")) == one


def reopened(root):
    return ImageFolder(str(root), 8, num_workers=0, batch_size=4), {
        "class_path": "vision_kd.data.ImageFolder",
        "init_args": {"root": str(root), "image_size": 8},
    }


def test_a_large_folder_is_known_by_some_of_its_bytes_and_all_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "BYTES_READ", 1000)
    files = [tmp_path / f"{number}" for number in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 100)
    before = digest.files_digest(tmp_path, files)
    files[2].write_bytes(b"x" * 100)  # every second one is read
    changed = digest.files_digest(tmp_path, files)
    files[3].write_bytes(b"x" * 101)
    assert len({before, changed, digest.files_digest(tmp_path, files)}) == 3


def test_a_data_set_of_ones_own_is_known_by_its_batches():
    class Own(Digits):
        training_digest = ImageDataModule.training_digest

    prints = []
    for pixel in (0, 0, 1):
        data = Own(**CONFIG["init_args"])
        data.setup("fit")
        data._splits[True][0][5, 0, 2, 2] += pixel
        prints.append(data.training_digest())
    assert prints[0] == prints[1] != prints[2]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_killed_teacher_goes_on_from_its_last_epoch(tmp_path, monkeypatch, epoch):
    """Killed inside the second and the third epoch, and after the last one; bit for bit the uninterrupted teacher."""
    whole = vision_kd.training.teacher.train_teacher(
        SPEC, digits()[0], DistillationModule, accelerator="cpu", progress_bar=False
    )
    started, start = [], DistillationModule.on_train_epoch_start
    monkeypatch.setattr(
        DistillationModule, "on_train_epoch_start", lambda self: (started.append(self.current_epoch), start(self))[1]
    )
    with monkeypatch.context() as patched:
        if epoch < SPEC.epochs:
            step = DistillationModule.training_step

            def killed(self, batch, batch_idx):
                if (self.current_epoch, batch_idx) == (epoch, 3):
                    raise KilledError
                return step(self, batch, batch_idx)

            patched.setattr(DistillationModule, "training_step", killed)
        else:

            def no_disk(*args, **kwargs):
                raise KilledError

            patched.setattr(vision_kd.training.teacher, "save_student", no_disk)
        with pytest.raises(KilledError):
            obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    started.clear()
    teacher, origin = obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    assert started == list(range(epoch, SPEC.epochs))
    assert origin.startswith("trained for 3 epochs")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[key]), key
    assert [path.suffix for path in cached().parent.iterdir() if path.suffix != ".lock"] == [".pt"]


def test_a_damaged_checkpoint_of_the_teacher_is_named_and_training_starts_anew(trainings):
    progress = cached().with_suffix(".ckpt")
    progress.parent.mkdir(parents=True)
    progress.write_bytes(b"half a checkpoint")
    with pytest.warns(UserWarning, match=f"starts anew.*{progress}"):
        _, origin = obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    assert origin.startswith("trained for 3 epochs")
    assert not progress.exists()


def test_a_teacher_whose_training_was_stopped_is_not_cached(monkeypatch):
    step = DistillationModule.training_step

    def stopped(self, batch, batch_idx):
        self.trainer.should_stop = True
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stopped)
    with pytest.raises(RuntimeError, match="teacher resnet8 was stopped in epoch 2 of 3"):
        obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    assert not cached().exists()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_teacher_whose_training_is_interrupted_says_what_is_kept(monkeypatch, caplog, epoch):
    step = DistillationModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == epoch:
            raise SIGTERMException
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"), pytest.raises(SystemExit):
        obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    [said] = [message for message in caplog.messages if message.startswith("Interrupted")]
    assert said.startswith(f"Interrupted in epoch {epoch} of the teacher's training")
    assert (str(cached().with_suffix(".ckpt")) in said) == bool(epoch)


def test_a_cache_that_can_only_be_read_serves_its_teacher(monkeypatch):
    obtain_teacher(SPEC, *digits(), accelerator="cpu", progress_bar=False)
    monkeypatch.setattr("kd_common.files.FileLock", None)
    assert obtain_teacher(SPEC, *digits())[1].startswith("from the cache")


def test_a_cache_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch, trainings):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"the teacher resnet8 is not there yet.*KD_CACHE"):
        obtain_teacher(SPEC, *digits())
    assert not trainings


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_damaged_cache_file_is_named_with_the_remedy(trainings, content):
    path = cached()
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
    with pytest.raises(ValueError, match=r"nowhere\.pt"):
        obtain_teacher(replace(SPEC, checkpoint="nowhere.pt"), *digits())
    assert not trainings


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("learning_rate", 0.0), ("weight_decay", -0.1), ("warmup_epochs", -1.0), ("clip_norm", 0.0)],
)
def test_settings_of_its_training_are_checked_under_its_own_name(name, value):
    with pytest.raises(ValueError, match=rf"model\.teacher\.{name} "):
        replace(SPEC, **{name: value})


def test_a_teacher_that_diverges_names_its_own_settings():
    with pytest.raises(NonFiniteLossError, match=r"teacher resnet8.* model\.teacher\.learning_rate"):
        obtain_teacher(replace(SPEC, learning_rate=1e3), *digits())
    assert not cached(replace(SPEC, learning_rate=1e3)).exists()


def test_a_dry_run_trains_no_teacher_and_takes_a_cached_one(digits_args, trainings):
    dry = [*digits_args, "--trainer.fast_dev_run=true"]
    assert run(build(dry)).teacher["origin"].startswith("random")
    assert not trainings
    assert not list(cache_root().rglob("*.pt"))
    run(build(digits_args))
    assert run(build(dry)).teacher["origin"].startswith("from the cache")


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
