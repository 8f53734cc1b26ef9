"""Processes that tests start: a function in two of them, as a cluster's launcher would, and a run that is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])
"""

# Trains as the command line does, but stands still after one batch of an epoch, until it is killed.
VICTIM = """
import importlib, sys, time
from pathlib import Path
import lightning.pytorch as pl
package, mark, epoch, batch, *arguments = sys.argv[1:]
fit = importlib.import_module(package + ".fit")

class StandStill(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, data, batch_idx):
        if (trainer.current_epoch, batch_idx) == (int(epoch), int(batch)):
            Path(mark).touch()
            time.sleep(600)

cli = fit.build(arguments)
cli.trainer.callbacks.append(StandStill())
fit.run(cli)
"""


@pytest.fixture(scope="session")
def kill_inside_epoch():
    """Kill a run of a package's ``fit`` after a batch of an epoch, both from 0; its output lands in ``folder``."""

    def kill(package, arguments, folder, *, epoch, batch):
        mark, log = folder / "mark", folder / "output"
        command = [sys.executable, "-c", VICTIM, package, str(mark), str(epoch), str(batch), *arguments]
        with log.open("w") as output:
            victim = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
            try:
                deadline = time.monotonic() + 240
                while not mark.exists():
                    assert victim.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            finally:
                victim.kill()
            assert victim.wait() == -signal.SIGKILL

    return kill


@pytest.fixture(scope="session")
def run_ranks():
    """Run ``function`` of a test module in two processes, its arguments strings; their outputs land in ``folder``."""

    def run(function, folder, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        file = Path(function.__code__.co_filename)
        command = [sys.executable, "-c", WORKER, str(file.parent), file.stem, function.__name__, *arguments]
        processes = []
        for rank in range(2):
            launch = {
                "WORLD_SIZE": 2,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            launch |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
            with (folder / f"output{rank}").open("w") as output:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | {key: str(value) for key, value in launch.items()},
                        stdout=output,
                        stderr=output,
                    )
                )
        try:
            codes = [process.wait(timeout=560) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0, 0], "\n".join((folder / f"output{rank}").read_text()[-4000:] for rank in range(2))

    return run
