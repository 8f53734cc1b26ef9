"""How a command ends: one message for what a user can mend, a traceback for everything else."""

import os
import subprocess
import sys
from importlib import import_module

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_common.registry import UnknownNameError
from kd_common.run.errors import run_command


class Model(pl.LightningModule):
    """Raises where it is told to."""

    def __init__(self, where):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.where = where

    def setup(self, stage):
        if self.where == "setup":
            raise ValueError("the data are wrong")

    def training_step(self, batch, batch_idx):
        raise ValueError("a fault in training")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(where):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(Model(where), torch.utils.data.DataLoader(torch.zeros(2, 1)))


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error",
    [ValueError("data.max_length is 0"), FileNotFoundError("no data.max_length"), UnknownNameError("data.max_length?")],
)
def test_a_refusal_is_one_message_and_code_2(error, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(error))
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"error: {error}\n(KD_TRACEBACK=1 in the environment shows where)\n")


def test_ctrl_c_ends_a_command_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(KeyboardInterrupt()))
    assert stopped.value.code == 130
    assert "are used again" in capsys.readouterr().err


def test_a_run_that_is_told_to_stop_does_not_end_as_a_finished_one():
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(SIGTERMException()))
    assert stopped.value.code == 143


@pytest.mark.parametrize("code", [None, 0, 2])
def test_other_exits_keep_their_code(code):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(SystemExit(code)))
    assert stopped.value.code == code


def test_a_setting_that_lightning_refuses_is_a_refusal(capsys):
    with pytest.raises(SystemExit):
        run_command(lambda: pl.Trainer(accelerator="cpu", devices=0))
    assert "devices=0" in capsys.readouterr().err


def test_full_memory_is_told_with_the_remedy():
    with pytest.raises(RuntimeError) as found:
        run_command(lambda: torch.empty(10**15))
    assert "smaller batches" in found.value.__notes__[0]


def test_a_fault_keeps_its_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(raising(RuntimeError("shapes")))
    monkeypatch.setenv("KD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="asked for"):
        run_command(raising(ValueError("asked for")))


def test_what_fails_before_training_is_a_refusal_and_what_fails_in_training_is_not(capsys):
    with pytest.raises(SystemExit):
        run_command(lambda: fit("setup"))
    assert "error: the data are wrong" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a fault in training"):
        run_command(lambda: fit("training_step"))


@pytest.mark.parametrize("traceback", ["", "1"])
def test_a_command_of_a_package(traceback, tmp_path):
    command = [
        sys.executable,
        "-m",
        "spec_decode.export",
        "--drafter",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"KD_TRACEBACK": traceback}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert f"{tmp_path} holds no drafter" in found.stderr
    assert ("Traceback" in found.stderr) == bool(traceback)
    assert found.returncode == (1 if traceback else 2)


@pytest.mark.parametrize("package", ["vision_kd", "llm_kd", "spec_decode"])
def test_a_report_is_not_made_where_a_file_is(package, tmp_path, capsys):
    main = import_module(f"{package}.report").main
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--output .*/file: .*/file is a file; name a folder$"):
        main([str(tmp_path / "run"), f"--output={tmp_path / 'file'}"])
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert f"runs is required, as in: python -m {package}.report runs/" in capsys.readouterr().err
