"""The entry point of a package lists its commands and runs them."""

import subprocess
import sys

import pytest

from kd_common.run.commands import commands, dispatch

PACKAGES = {
    "vision_kd": {"compare", "evaluate", "fit", "report"},
    "llm_kd": {"cache_teacher", "compare", "evaluate", "fit", "generate", "report"},
    "spec_decode": {"benchmark", "chat", "compare", "export", "fit", "generate", "report"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_commands_with_a_line_each(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [package])
    dispatch(package)
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert listed.keys() == PACKAGES[package]
    assert all(line.endswith(".") for line in listed.values())
    assert listed == commands(package)


def test_an_unknown_command_is_refused_with_what_may_have_been_meant(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vision-kd", "evalute"])
    with pytest.raises(SystemExit, match="2"):
        dispatch("vision_kd")
    assert "did you mean evaluate?" in capsys.readouterr().err


def test_a_command_gets_the_remaining_arguments():
    done = subprocess.run(
        [sys.executable, "-m", "vision_kd", "report", "--nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--nonsense" in done.stderr
