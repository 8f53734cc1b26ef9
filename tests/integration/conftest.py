"""Processes that tests start: a function in two of them, as a cluster's launcher would, and a run that is killed.

And what the tests of faults share: tiny models, states compared bit for bit, a process that dies at a chosen moment, a
disk without room, files that would run code.
"""

import faulthandler
import importlib
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

DEADLINE = 900  # seconds a forked process may take


def fork(function, log):
    """Run a function in a process that has imported all that this one has; returns its id, its output is in a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(sys.stdout))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        tqdm.set_lock(threading.RLock())  # its own is shared by forks, and dies with whoever holds it
        warnings.simplefilter("default")
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        function()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture(scope="session")
def forked():
    """:func:`fork`, for tests that cannot import a conftest."""
    return fork


class StandStill(pl.Callback):
    """Waits after a batch of an epoch until the process is killed, and leaves a file that says so."""

    def __init__(self, mark, epoch, batch):
        self.mark, self.at = mark, (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, data, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            self.mark.touch()
            time.sleep(600)


@pytest.fixture(scope="session")
def kill_inside_epoch():
    """Kill a run of a package's ``fit`` after a batch of an epoch, both from 0; its output lands in ``folder``."""

    def kill(package, arguments, folder, *, epoch, batch):
        mark, log = folder / "mark", folder / "output"
        fit = importlib.import_module(f"{package}.fit")

        def train():
            cli = fit.build(arguments)
            cli.trainer.callbacks.append(StandStill(mark, epoch, batch))
            fit.run(cli)

        victim, deadline = fork(train, log), time.monotonic() + 240
        while not mark.exists():
            assert os.waitpid(victim, os.WNOHANG) == (0, 0), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)

    return kill


@pytest.fixture(scope="session")
def run_ranks():
    """Run a function in two processes as a launcher starts them; their outputs land in ``folder``."""

    def run(function, folder, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def work(rank):
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ.update({key: str(value) for key, value in launch.items()})
            rank_zero_only.rank = rank  # which Lightning reads when it is imported
            function(*arguments)

        ranks = [fork(partial(work, rank), folder / f"output{rank}") for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        assert codes == [0, 0], "\n".join((folder / f"output{rank}").read_text()[-4000:] for rank in range(2))

    return run


@pytest.fixture(scope="session")
def target(tmp_path_factory, save_llama):
    """A tiny target with a tokenizer, saved."""
    folder = tmp_path_factory.mktemp("standin")
    save_llama(folder)
    return folder


TINY = [
    "--seed_everything=5",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def vision(folder, target):
    return [
        "--data.batch_size=32",
        "--data.train_subset=96",
        "--model.student.name=resnet8",
        "--model.teacher.name=resnet8",
        "--model.teacher.epochs=1",
        "--model.gsnr_every=2",
    ]


def language(folder, target):
    for split, numbers in (("train", range(12)), ("val", range(12, 16))):
        lines = [json.dumps({"instruction": f"Count to {n}."}) + "\n" for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return [
        f"--model.teacher.name={target}",
        "--model.student.layers=2",
        f"--data.train={folder / 'train.jsonl'}",
        f"--data.val={folder / 'val.jsonl'}",
        "--data.sampling.max_new_tokens=4",
        "--data.batch_size=4",
        "--answers=0",
    ]


def drafting(folder, target):
    return [
        "--trainer.precision=32-true",
        f"--model.target.name={target}",
        "--model.target.dtype=float32",
        "--model.drafter=FastEagle",
        "--model.drafter.depth=2",
        "--model.drafter.draft_vocab=90",
        "--data.limit=8",
        "--data.val_prompts=2",
        "--data.sampling.max_new_tokens=6",
        "--data.generation_batch_size=3",
        "--data.max_length=200",
        "--data.batch_size=2",
        "--measure_prompts=0",
    ]


@pytest.fixture(scope="session")
def tiny_run(target):
    """Arguments of the smallest run of a package; its data land in a folder."""
    settings = {"vision_kd": vision, "llm_kd": language, "spec_decode": drafting}
    return lambda package, folder: [*TINY, *settings[package](folder, target)]


@pytest.fixture(scope="session")
def outcome():
    """What a run leaves: its state for resuming, without paths, and its models."""

    def read(folder):
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "history", "epoch")
        state = {key: checkpoint[key] for key in kept}
        models = {}
        for path in sorted([*folder.rglob("*.pt"), *folder.rglob("*.safetensors")]):
            name = str(path.relative_to(folder))
            models[name] = torch.load(path, weights_only=True)["model"] if path.suffix == ".pt" else path.read_bytes()
        return state | {"models": models}

    return read


TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="session")
def assert_equal():
    """Compare every tensor and number of two nested states, bit for bit; but for the time that something took."""

    def compare(found, expected, where=""):
        assert type(found) is type(expected), where
        if isinstance(expected, dict):
            assert list(found) == list(expected), where
            for key in expected:
                if key not in TIMES:
                    compare(found[key], expected[key], f"{where}.{key}")
        elif isinstance(expected, list | tuple):
            assert len(found) == len(expected), where
            for i, pair in enumerate(zip(found, expected, strict=True)):
                compare(*pair, f"{where}[{i}]")
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), where
        else:
            assert found == expected, where

    return compare


WRITES = os.O_WRONLY | os.O_RDWR


class Moments:
    """Audit hook that counts what a process does to the files below some folders, and its training steps.

    Args:
        folders: The folders.
        last: Number of the moment, from 0, right before which the process kills itself; None to count only.
    """

    def __init__(self, folders, last=None):
        self.folders, self.last, self.seen = tuple(map(str, folders)), last, []

    def __call__(self, event, args):
        if event in ("os.rename", "os.remove", "os.truncate", "kd.step") or (event == "open" and args[2] & WRITES):
            name = args[0]
        else:
            return
        if event == "kd.step" or (isinstance(name, str | Path) and str(name).startswith(self.folders)):
            self.seen.append(f"{event} {name}")
            if len(self.seen) - 1 == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


class Step(pl.Callback):
    """Makes a moment of every batch."""

    def on_train_batch_end(self, *_):
        sys.audit("kd.step", "")


@pytest.fixture(scope="session")
def step_moments():
    """Callback to append to a trainer, so that :func:`die` can kill between two of its steps."""
    return Step()


@pytest.fixture(scope="session")
def die():
    """Run a function in a forked process that may be killed; returns its moments, or None if it was.

    A process dies right before its moment ``at`` (it opens a file to write, renames, removes, truncates, or has made a
    step), or once a file has grown to ``size`` bytes: in the middle of a write.
    """

    def run(function, log, folders, *, at=None, size=None):
        read, write = os.pipe()

        def watched():
            os.close(read)
            moments = Moments(folders, at)
            sys.addaudithook(moments)
            if size is not None:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            function()
            with os.fdopen(write, "w") as pipe:
                pipe.write("\n".join(moments.seen))

        child = fork(watched, log)
        os.close(write)
        with os.fdopen(read) as pipe:
            seen = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == (signal.SIGXFSZ if size is not None else signal.SIGKILL), log.read_text()
            return None
        assert os.WEXITSTATUS(status) == 0, log.read_text()
        return seen.splitlines()

    return run


@pytest.fixture(scope="session")
def full_disk():
    """Context in which no file can grow beyond some bytes: the kernel refuses the write, as on a disk without room."""

    @contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
