"""Commands started by torchrun itself, and by processes that see what SLURM's srun sets: two ranks do one run.

In float64 against one process with the doubled batch. Each launch begins in an empty folder, without --run_dir.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(900)]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WITHOUT_BATCHNORM = """
import test_vision_ddp  # registers a network whose result does not depend on how a batch is shared out
from vision_kd.fit import main
main()
"""
# Module, settings of float64, batch of one process, and a line of the table at the end.
COMMANDS = {
    "vision_kd": ("fit_without_batchnorm", ["--model.student.name=test_ddp_tiny"], 32, "k reached"),
    "llm_kd": ("llm_kd.fit", ["--model.teacher.dtype=float64", "--model.student.dtype=float64"], 4, "peak memory"),
    "spec_decode": (
        "spec_decode.fit",
        ["--model.target.dtype=float64", "--data.features=online"],
        2,
        "acceptance of a level",
    ),
}


def slurm(rank, port):
    """What srun sets for one of two tasks of a job on one node."""
    job = {
        "JOB_ID": 4711,
        "JOB_NAME": "distil",
        "NTASKS": 2,
        "NTASKS_PER_NODE": 2,
        "NNODES": 1,
        "NODELIST": "localhost",
    }
    task = {"PROCID": rank, "LOCALID": rank, "NODEID": 0}
    variables = {f"SLURM_{name}": str(value) for name, value in (job | task).items()}
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def start(tmp_path, tiny_run):
    """Run a package's command in a new folder with some launcher; returns the folder and what all ranks printed."""
    (tmp_path / "fit_without_batchnorm.py").write_text(WITHOUT_BATCHNORM)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])

    def run(package, launcher=None):
        folder = tmp_path / (launcher or "single")
        folder.mkdir()
        module, settings, batch, _ = COMMANDS[package]
        ranks = 1 if launcher is None else 2
        command = [sys.executable, *(TORCHRUN if launcher == "torchrun" else []), "-m", module]
        command += [*tiny_run(package, tmp_path), "--trainer.max_epochs=2", "--trainer.precision=64-true", *settings]
        command += [f"--data.batch_size={batch // ranks}", f"--trainer.devices={ranks}"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launches = [slurm(rank, port) for rank in range(2)] if launcher == "slurm" else [{}]
        # The teacher of images must have been trained before.
        cache = tmp_path / "cache" if package == "vision_kd" else folder / "cache"
        shared = {"PYTHONPATH": paths, "KD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        outputs = [folder / f"output{n}" for n in range(len(launches))]
        processes = []
        for launch, output in zip(launches, outputs, strict=True):
            with output.open("w") as file:
                environment = os.environ | shared | launch
                processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file))
        try:
            codes = [process.wait(timeout=800) for process in processes]
        finally:
            for process in processes:
                process.terminate()  # torchrun, killed, would leave its workers behind
            for process in processes:
                process.wait(timeout=60)
        printed = "\n".join(output.read_text() for output in outputs)
        assert not any(codes), printed[-8000:]
        return folder, printed

    return run


def written(run):
    """Names of what a run left, but for those that the log files end in."""
    return sorted("events" if "tfevents" in path.name else path.name for path in run.iterdir())


@pytest.mark.parametrize(
    ("package", "launcher"),
    [("vision_kd", "torchrun"), ("llm_kd", "torchrun"), ("spec_decode", "torchrun"), ("spec_decode", "slurm")],
)
def test_two_launched_processes_do_one_run(package, launcher, start):
    single, _ = start(package)
    folder, printed = start(package, launcher)
    [expected], [found] = (list(where.glob("runs/*/*")) for where in (single, folder))
    assert printed.count(COMMANDS[package][-1]) == 1, printed
    assert written(found) == written(expected)
    parameters = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (found, expected)
    ]
    for key, value in parameters[1].items():
        torch.testing.assert_close(parameters[0][key], value, rtol=0, atol=1e-9)
