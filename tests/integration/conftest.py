"""Start the same function in two processes, as a cluster's launcher would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])
"""


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
