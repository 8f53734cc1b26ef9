"""Ctrl-C and too little memory, for real: the command ends with a message that says how to go on."""

import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from kd_common.files import complete_lines
from kd_common.run.checkpoints import check_resumable
from kd_common.run.errors import run_command
from llm_kd import cache_teacher
from llm_kd import fit as llm_fit
from llm_kd.data import responses
from llm_kd.teacher import TeacherCache
from spec_decode import fit as spec_fit
from spec_decode.data import features
from vision_kd import fit as vision_fit

pytestmark = pytest.mark.slow


def stand_still(mark):
    mark.touch()
    time.sleep(600)


def waiting(function, mark, call, *, done):
    """The function, but a call of this number does not end; with ``done`` it has done its work before it waits."""
    calls = []

    def wait(*args, **settings):
        calls.append(args)
        result = function(*args, **settings) if done or len(calls) < call else None
        return result if len(calls) < call else stand_still(mark)

    return wait


class InEpoch1(pl.Callback):
    """Does something after the first batch of epoch 1."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            self.action()


def train(arguments, action):
    cli = vision_fit.build(arguments)
    cli.trainer.callbacks.append(InEpoch1(action))
    vision_fit.run(cli)


@pytest.fixture
def start(tmp_path, forked):
    """Run a command in a process of its own; its id, and what it has written so far."""
    started = []

    def run(command):
        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
            run_command(command)

        started.append(forked(work, tmp_path / "log"))
        return started[-1], (tmp_path / "log").read_text

    yield run
    for process in started:
        with suppress(ChildProcessError):  # it has ended
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                os.kill(process, signal.SIGKILL)


def end(process):
    """Wait for a process; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def interrupt(process, mark, written):
    """Press Ctrl-C once the process has reached the mark; its exit code."""
    deadline = time.monotonic() + 400
    while not mark.exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), written()
        assert time.monotonic() < deadline, written()
        time.sleep(0.1)
    os.kill(process, signal.SIGINT)
    return end(process)


def test_ctrl_c_during_training(start, tiny_run, tmp_path):
    arguments, mark = [*tiny_run("vision_kd", tmp_path), f"--run_dir={tmp_path / 'run'}"], tmp_path / "mark"
    process, written = start(lambda: train(arguments, lambda: stand_still(mark)))
    assert interrupt(process, mark, written) == 1
    last = tmp_path / "run/checkpoints/last.ckpt"
    check_resumable(last)
    expected = f"Interrupted in epoch 1. Last checkpoint: {last}; go on from there with --ckpt_path {last}."
    assert expected in written()
    assert "Traceback" not in written()


def test_ctrl_c_while_features_are_written(start, tiny_run, tmp_path, monkeypatch):
    """The second write waits, so one batch of features is complete."""
    arguments = [*tiny_run("spec_decode", tmp_path), f"--run_dir={tmp_path / 'run'}", "--data.limit=16"]
    to_disk = waiting(features._to_disk, tmp_path / "mark", 3, done=True)
    monkeypatch.setattr(features, "_to_disk", to_disk)
    process, written = start(lambda: spec_fit.main(arguments))
    assert interrupt(process, tmp_path / "mark", written) == 1
    assert "Interrupted in epoch 0. Last checkpoint: none written yet; start again, caches are kept." in written()
    assert "Traceback" not in written()
    (progress,) = Path(os.environ["KD_CACHE"]).rglob(features.PROGRESS)
    assert len(complete_lines(progress)) == 1


def test_ctrl_c_while_the_teacher_answers(start, tiny_run, tmp_path, monkeypatch):
    """The third batch of answers waits, so eight rows are complete."""
    arguments = [*tiny_run("llm_kd", tmp_path), f"--run_dir={tmp_path / 'run'}", "--data.generation_batch_size=4"]
    monkeypatch.setattr(responses, "generate", waiting(responses.generate, tmp_path / "mark", 3, done=False))
    process, written = start(lambda: llm_fit.main(arguments))
    assert interrupt(process, tmp_path / "mark", written) == 130
    assert "Interrupted. Answers, features" in written()
    assert "Traceback" not in written()
    (partial,) = Path(os.environ["KD_CACHE"]).rglob("*.partial")
    assert len(complete_lines(partial)) == 8


def test_ctrl_c_while_the_teacher_is_cached(start, tiny_run, target, tmp_path, monkeypatch):
    """The second batch of the cache waits, so eight rows are complete."""
    data = [argument for argument in tiny_run("llm_kd", tmp_path) if argument.startswith("--data.")]
    arguments = [f"--model.teacher.name={target}", "--size=8", f"--folder={tmp_path / 'cache'}", *data]
    monkeypatch.setattr(cache_teacher, "_add", waiting(cache_teacher._add, tmp_path / "mark", 2, done=False))
    process, written = start(lambda: cache_teacher.main(arguments))
    assert interrupt(process, tmp_path / "mark", written) == 130
    assert "Interrupted. Answers, features" in written()
    assert "Traceback" not in written()
    cache = TeacherCache(tmp_path / "cache")
    assert not cache.complete
    assert len(list(cache.keys())) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_during_training(start, tiny_run, tmp_path):
    arguments = [*tiny_run("vision_kd", tmp_path), f"--run_dir={tmp_path / 'run'}"]

    def fill_memory():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
        torch.empty(2**30)

    process, written = start(lambda: train(arguments, fill_memory))
    assert end(process) == 1
    assert "Too little memory (lower data.batch_size, and accumulate batches instead) in epoch 1." in written()
    assert f"go on from there with --ckpt_path {tmp_path / 'run/checkpoints/last.ckpt'}" in written()
    assert "The memory is full: smaller batches" in written()
