"""A folder in use by a live run is refused; one of a dead or finished run is not."""

import os
import signal
import subprocess
import sys

import pytest

from kd_common.run.run_lock import hold, let_go

HOLDER = """
import os, sys, time
from pathlib import Path
from kd_common.run.run_lock import hold
hold(Path(sys.argv[1]))
if os.fork() == 0:  # as a loader's worker, which outlives a killed run for a while
    print("held", flush=True)
    os.close(1)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_folder_of_a_live_run_is_refused_until_it_dies(tmp_path, holder):
    with pytest.raises(ValueError, match=f"--run_dir {tmp_path}"):
        hold(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    hold(tmp_path)
    let_go(tmp_path)


def test_a_process_may_run_in_its_folder_again(tmp_path):
    hold(tmp_path)
    hold(tmp_path)
    let_go(tmp_path)
    code = "import sys; from pathlib import Path; from kd_common.run.run_lock import hold; hold(Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
