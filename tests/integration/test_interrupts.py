"""Ctrl-C and too little memory, for real: the command ends with a message that says how to go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_common.files import complete_lines
from kd_common.run.checkpoints import check_resumable
from llm_kd.teacher import TeacherCache
from spec_decode.data.features import PROGRESS

pytestmark = pytest.mark.slow

COMMAND = """
import resource, signal, sys, time
from importlib import import_module
from pathlib import Path
import lightning.pytorch as pl
import torch
from kd_common.run.errors import run_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
package, mark, *arguments = sys.argv[1:]
fit = import_module(package + ".fit")

def wait(*_):
    Path(mark).touch()
    time.sleep(600)
"""
TRAINING = """
class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            ACTION

def command():
    cli = fit.build(arguments)
    cli.trainer.callbacks.append(Stop())
    fit.run(cli)

run_command(command)
"""
# The second write waits, so one batch of features is complete.
FEATURES = """
import spec_decode.data.features as features
to_disk, calls = features._to_disk, []

def slow(file):
    calls.append(file)
    to_disk(file)
    len(calls) < 3 or wait()

features._to_disk = slow
run_command(lambda: fit.main(arguments))
"""
# The third batch of answers waits, and the second of the teacher's cache, so eight rows are complete.
RESPONSES = """
import llm_kd.data.responses as responses
generate, calls = responses.generate, []

def slow(*prompts, **settings):
    calls.append(settings)
    return generate(*prompts, **settings) if len(calls) < 3 else wait()

responses.generate = slow
run_command(lambda: fit.main(arguments))
"""
TEACHER = """
import llm_kd.cache_teacher as command
add, calls = command._add, []

def slow(*batch):
    calls.append(batch)
    return add(*batch) if len(calls) < 2 else wait()

command._add = slow
run_command(lambda: command.main(arguments))
"""
LIMIT = """used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
            torch.empty(2**30)"""


@pytest.fixture
def start(tmp_path):
    """Start a script with a package's tiny run; the process, and what it has written so far."""
    processes = []

    def run(script, package, arguments):
        log = tmp_path / f"log{len(processes)}"
        command = [sys.executable, "-c", COMMAND + script, package, str(tmp_path / "mark"), *arguments]
        with log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return processes[-1], log.read_text

    yield run
    for process in processes:
        process.kill()
        process.wait()


def interrupt(process, mark, written):
    """Press Ctrl-C once the process has reached the mark; its exit status."""
    deadline = time.monotonic() + 400
    while not mark.exists():
        assert process.poll() is None, written()
        assert time.monotonic() < deadline, written()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=100)


def test_ctrl_c_during_training(start, tiny_run, tmp_path):
    arguments = [*tiny_run("vision_kd", tmp_path), f"--run_dir={tmp_path / 'run'}"]
    process, written = start(TRAINING.replace("ACTION", "wait()"), "vision_kd", arguments)
    assert interrupt(process, tmp_path / "mark", written) == 1
    last = tmp_path / "run/checkpoints/last.ckpt"
    check_resumable(last)
    expected = f"Interrupted in epoch 1. Last checkpoint: {last}; go on from there with --ckpt_path {last}."
    assert expected in written()
    assert "Traceback" not in written()


def test_ctrl_c_while_features_are_written(start, tiny_run, tmp_path):
    arguments = [*tiny_run("spec_decode", tmp_path), f"--run_dir={tmp_path / 'run'}", "--data.limit=16"]
    process, written = start(FEATURES, "spec_decode", arguments)
    assert interrupt(process, tmp_path / "mark", written) == 1
    assert "Interrupted in epoch 0. Last checkpoint: none written yet; start again, caches are kept." in written()
    assert "Traceback" not in written()
    (progress,) = Path(os.environ["KD_CACHE"]).rglob(PROGRESS)
    assert len(complete_lines(progress)) == 1


def test_ctrl_c_while_the_teacher_answers(start, tiny_run, tmp_path):
    arguments = [*tiny_run("llm_kd", tmp_path), f"--run_dir={tmp_path / 'run'}", "--data.generation_batch_size=4"]
    process, written = start(RESPONSES, "llm_kd", arguments)
    assert interrupt(process, tmp_path / "mark", written) == 130
    assert "Interrupted. Answers, features" in written()
    assert "Traceback" not in written()
    (partial,) = Path(os.environ["KD_CACHE"]).rglob("*.partial")
    assert len(complete_lines(partial)) == 8


def test_ctrl_c_while_the_teacher_is_cached(start, tiny_run, target, tmp_path):
    data = [argument for argument in tiny_run("llm_kd", tmp_path) if argument.startswith("--data.")]
    arguments = [f"--model.teacher.name={target}", "--size=8", f"--folder={tmp_path / 'cache'}", *data]
    process, written = start(TEACHER, "llm_kd", arguments)
    assert interrupt(process, tmp_path / "mark", written) == 130
    assert "Interrupted. Answers, features" in written()
    assert "Traceback" not in written()
    cache = TeacherCache(tmp_path / "cache")
    assert not cache.complete
    assert len(list(cache.keys())) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_during_training(start, tiny_run, tmp_path):
    arguments = [*tiny_run("vision_kd", tmp_path), f"--run_dir={tmp_path / 'run'}"]
    process, written = start(TRAINING.replace("ACTION", LIMIT), "vision_kd", arguments)
    assert process.wait(timeout=400) == 1
    assert "Too little memory (lower data.batch_size, and accumulate batches instead) in epoch 1." in written()
    assert f"go on from there with --ckpt_path {tmp_path / 'run/checkpoints/last.ckpt'}" in written()
    assert "The memory is full: smaller batches" in written()
