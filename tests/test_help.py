"""The stored help of every command is what its parser prints. ``python tests/test_help.py`` writes it anew."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_common.run.early import CONFIGS, WIDTH, answer_early, options_of, stored_help, versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vision_kd", "llm_kd", "spec_decode")
COMMANDS = [
    f"{package}.{file.stem}"
    for package in PACKAGES
    for file in sorted((ROOT / "packages" / package / "src" / package).glob("*.py"))
    if "answer_early(" in file.read_text()
]

# The parsers of a package in one process: every import costs seconds.
PRINT = """
import contextlib, io, runpy, sys
import kd_common.run.early
kd_common.run.early.answer_early = lambda command: None
found = {}
for command in sys.argv[1:]:
    sys.argv, said = [f"{command.rpartition('.')[2]}.py", "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(command, run_name="__main__")
    found[command] = said.getvalue()
print("RESULT", repr(found))
"""


def printed(package):
    """What the parsers of a package print, with a placeholder for the file of its default configuration."""
    commands = [command for command in COMMANDS if command.startswith(f"{package}.")]
    ran = subprocess.run(
        [sys.executable, "-c", PRINT, *commands],
        env=os.environ | {"COLUMNS": WIDTH},
        capture_output=True,
        text=True,
        check=True,
    )
    found = ast.literal_eval(ran.stdout.partition("RESULT ")[2])
    # The parser breaks these lines by the length of the folder's name.
    place = re.compile(r"(?<=default config file locations:\n).*?(?=\n\n)", re.S)
    note = f"  {CONFIGS}/default.yaml, which overrides the default values below"
    return {command: place.sub(note, text) for command, text in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_stored_help_is_what_the_parsers_print(package):
    for command, text in printed(package).items():
        if made_with(command) != versions():
            pytest.skip(f"the stored help was made with {made_with(command)}: it is not used here")
        stored = stored_help(command).read_text().partition("\n")[2]
        assert stored == text, f"{command}: write it anew with `python {Path(__file__).name}`"


def test_every_command_has_one():
    assert len(COMMANDS) == 17
    for command in COMMANDS:
        options, _ = options_of(stored_help(command).read_text())
        assert {"--help", "--import"} <= options


def made_with(command):
    return stored_help(command).read_text().partition("\n")[0]


def answered(monkeypatch, capsys, command, *args):
    monkeypatch.setattr("sys.argv", ["x", *args])
    monkeypatch.setattr("kd_common.run.early.versions", lambda: made_with(command))
    with pytest.raises(SystemExit) as left:
        answer_early(command)
    return left.value.code, capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_answered(monkeypatch, capsys, command):
    code, said = answered(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert re.match(r"usage: ", said.out)
    assert CONFIGS not in said.out


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("vision_kd.fit", ["--trainer.pluginss", "2"], "--trainer.pluginss; did you mean plugins?"),
        ("vision_kd.fit", ["--modell.width=2"], "--modell.width=2; did you mean --model?"),
        ("llm_kd.fit", ["--config", "x", "--ckpt", "y"], "--ckpt; did you mean --ckpt_path?"),
        ("llm_kd.evaluate", ["--data.vall", "2"], "--data.vall; did you mean val?"),
        ("spec_decode.generate", ["--promt", "x"], "--promt; did you mean --prompt?"),
        ("spec_decode.report", ["runs", "--nonsense"], "--nonsense"),
    ],
)
def test_a_mistyped_option_is_refused(monkeypatch, capsys, command, args, message):
    code, said = answered(monkeypatch, capsys, command, *args)
    assert code == 2
    assert said.err.splitlines()[-1] == f"error: Unrecognized arguments: {message}"


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("vision_kd.fit", []),
        ("vision_kd.fit", ["-c", "x", "--config=y", "--print_config", "--model.method.temperature=2"]),
        ("vision_kd.fit", ["--import", "mine", "--trainer.callbacks+", "x", "--trainer.callbacks.patience", "2"]),
        ("vision_kd.fit", ["--trainer.max_time.days=1", "--data.init_args.seed=1", "--model.help", "X"]),
        ("llm_kd.generate", ["--prompt", "a -- b", "--model=x"]),
        ("spec_decode.benchmark", ["--prompts.mine", "x.jsonl", "--drafters", "[a]", "--drafters+=b"]),
        ("vision_kd.report", ["run_0", "--output", "x"]),
    ],
)
def test_everything_else_is_left_to_the_parser(monkeypatch, command, args):
    monkeypatch.setattr("sys.argv", ["x", *args])
    monkeypatch.setattr("kd_common.run.early.versions", lambda: made_with(command))
    answer_early(command)


def test_other_versions_are_left_to_the_parser(monkeypatch):
    monkeypatch.setattr("kd_common.run.early.versions", lambda: "lightning==0")
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    answer_early("vision_kd.fit")


@pytest.mark.parametrize("args", [["--help"], ["--nonsense"]])
@pytest.mark.parametrize("command", ["vision_kd.fit", "llm_kd.evaluate", "spec_decode.generate"])
def test_neither_needs_pytorch(command, args):
    if made_with(command) != versions():
        pytest.skip(f"the stored help was made with {made_with(command)}: it is not used here")
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('LOADED', {'torch', 'lightning', 'transformers'} & sys.modules.keys()))\n"
        f"sys.argv = ['x', *{args!r}]\n"
        f"runpy.run_module({command!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == (0 if args == ["--help"] else 2)
    assert "LOADED set()" in ran.stdout


if __name__ == "__main__":
    for name in PACKAGES:
        for command, text in printed(name).items():
            stored_help(command).parent.mkdir(exist_ok=True)
            stored_help(command).write_text(f"{versions()}\n{text}")
