"""How a command ends: one message for what a user can mend, a traceback for everything else."""

from importlib import import_module

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_common.errors import UserError
from kd_common.registry import UnknownNameError
from kd_common.run.errors import run_command


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error",
    [
        UserError("data.max_length is 0"),
        UnknownNameError("data.max_length?"),
        FileNotFoundError(2, "No such file", "a"),
    ],
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


def test_full_memory_is_told_with_the_remedy():
    with pytest.raises(RuntimeError) as found:
        run_command(lambda: torch.empty(10**15))
    assert "smaller batches" in found.value.__notes__[0]


def test_a_fault_keeps_its_traceback(monkeypatch):
    for fault in (RuntimeError("shapes"), ValueError("shapes"), OSError("shapes")):
        with pytest.raises(type(fault), match="shapes"):
            run_command(raising(fault))
    monkeypatch.setenv("KD_TRACEBACK", "1")
    with pytest.raises(UserError, match="asked for"):
        run_command(raising(UserError("asked for")))


@pytest.mark.parametrize("package", ["vision_kd", "llm_kd", "spec_decode"])
def test_a_report_is_not_made_where_a_file_is(package, tmp_path, capsys):
    main = import_module(f"{package}.report").main
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--output .*/file: .*/file is a file; name a folder$"):
        main([str(tmp_path / "run"), f"--output={tmp_path / 'file'}"])
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert f"runs is required, as in: python -m {package}.report runs/" in capsys.readouterr().err
