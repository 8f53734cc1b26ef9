"""What a configuration imports: classes of known packages, and nothing else unless the command line says so."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from kd_common.run.compare import ComparedRun, run_matrix
from kd_common.run.imports import asked_for, import_asked_for
from kd_common.run.messages import CommandParser


class Rule:
    """A replaceable part.

    Args:
        call: A function.
        extra: Anything.
    """

    def __init__(self, call: Callable | None = None, extra: Any = None) -> None:
        self.call, self.extra = call, extra


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory; it leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("kd_common.run.imports._asked_for", set())
    written = []

    def write(name, text=""):
        head = "import pathlib\npathlib.Path('trace').touch()\n"
        (tmp_path / f"{name}.py").write_text(head + text)
        written.append(name)
        return tmp_path / "trace"

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def parse(capsys):
    def run(*args, object=None):
        parser = CommandParser(prog="python -m x")
        parser.add_argument("--config", action="config")
        parser.add_argument("--rule", type=Rule | None)
        parser.add_argument("--rules", type=list[Rule] | None)
        parser.add_argument("--kind", type=type[Rule] | None)
        parser.add_argument("--settings", type=dict[str, Any] | None)
        found = parser.parse_args(list(args)) if object is None else parser.parse_object(object)
        return parser.instantiate_classes(found)

    return run


DERIVED = f"from {__name__} import Rule\nclass Mine(Rule): pass\ndef call(): pass\n"


def refuse(parse, capsys, trace, *args):
    with pytest.raises(SystemExit, match="2"):
        parse(*args)
    assert not trace.exists()
    assert "stray_one" not in sys.modules
    assert "--import stray_one" in capsys.readouterr().err


VALUES = [
    ("rule", "stray_one.Mine"),
    ("rule.class_path", "stray_one.Mine"),
    ("rule", "{class_path: stray_one.Mine}"),
    ("rules", "[stray_one.Mine]"),
    ("kind", "stray_one.Mine"),
    ("rule.call", "stray_one.call"),
    ("rule.call", "{class_path: stray_one.Mine}"),
]


@pytest.mark.parametrize(("setting", "value"), [*VALUES, ("rules+", "stray_one.Mine"), ("rule.help", "stray_one.Mine")])
def test_a_command_line_imports_no_module_that_nobody_asked_for(parse, module, capsys, setting, value):
    trace = module("stray_one", DERIVED)
    refuse(parse, capsys, trace, f"--{setting}", value)
    refuse(parse, capsys, trace, f"--{setting}={value}")


@pytest.mark.parametrize(("setting", "value"), VALUES)
def test_a_file_imports_no_module_that_nobody_asked_for(parse, module, tmp_path, capsys, setting, value):
    trace = module("stray_one", DERIVED)
    outer, _, inner = setting.partition(".")
    (tmp_path / "c.yaml").write_text(f"{outer}: {{{inner}: {value}}}" if inner else f"{outer}: {value}")
    refuse(parse, capsys, trace, "--config", str(tmp_path / "c.yaml"))


def test_the_command_line_imports_a_module_for_the_configuration(parse, module, tmp_path):
    module("stray_two", DERIVED)
    (tmp_path / "c.yaml").write_text("rule: {class_path: stray_two.Mine, init_args: {call: stray_two.call}}")
    found = parse("--config", str(tmp_path / "c.yaml"), "--import", "stray_two")
    assert type(found.rule).__name__ == "Mine"
    assert found.rule.call is sys.modules["stray_two"].call
    assert type(parse("--import=stray_two", "--rule", "Mine").rule) is type(found.rule)
    assert "import" not in found
    assert asked_for() == ["--import=stray_two"]


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "functools.partial", "builtins.exec", "torch.os.system", "torch.load"]
)
@pytest.mark.parametrize("setting", ["rule", "rule.call", "kind"])
def test_what_is_no_subclass_of_what_is_asked_for_is_refused(parse, capsys, path, setting):
    with pytest.raises(SystemExit, match="2"):
        parse(f"--{setting}", path)
    assert path.rpartition(".")[2] in capsys.readouterr().err


def test_a_class_of_a_known_package_is_imported_and_compared_with_what_is_asked_for(parse, capsys):
    assert parse("--rule", f"{__name__}.Rule").rule.call is None
    with pytest.raises(SystemExit, match="2"):
        parse("--rule", "torch.nn.Linear")
    assert "torch.nn.Linear" in capsys.readouterr().err


def test_a_setting_of_any_type_holds_plain_values(parse, module):
    trace = module("stray_three", DERIVED)
    block = {"class_path": "stray_three.Mine", "init_args": {}}
    assert parse(object={"settings": {"a": block}}).settings == {"a": block}
    assert parse("--settings", "{a: {class_path: os.system}}").settings == {"a": {"class_path": "os.system"}}
    assert parse("--rule.extra", "{class_path: stray_three.Mine, init_args: {}}").rule.extra == block
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stray_none", "no such module"),
        ("stray_four.part", "no such module"),
        ("stray_four", "it needs stray_missing, which is not installed"),
        ("./stray_four", "name of a module"),
        ("stray_four.py", "name of a module"),
        ("", "name of a module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(parse, module, capsys, name, said):
    module("stray_four", "import stray_missing" if said.startswith("it") else "")
    with pytest.raises(SystemExit, match="2"):
        parse("--import", name)
    message = capsys.readouterr().err
    assert f"--import {name}" in message.replace("'", "")
    assert said in message


def test_a_configuration_cannot_ask_for_imports(parse, module, tmp_path, capsys):
    trace = module("stray_five")
    (tmp_path / "c.yaml").write_text("import: stray_five")
    with pytest.raises(SystemExit, match="2"):
        parse("--config", str(tmp_path / "c.yaml"))
    assert "import" in capsys.readouterr().err
    for given in (
        {"base": ["--import=stray_five"], "variants": {"a": []}},
        {"base": [], "variants": {"a": ["--import", "stray_five"]}},
        {"base": [], "variants": {"a": []}, "overrides": ["--import", "stray_five"]},
    ):
        with pytest.raises(ValueError, match=r"--import.* is for the command line"):
            run_matrix(ComparedRun, output=tmp_path / "out", **given)
    assert not trace.exists()


def test_imports_reach_other_processes(module):
    module("stray_six")
    assert import_asked_for(["a", "--import", "stray_six", "b"]) == ["a", "b"]
    assert asked_for() == ["--import=stray_six"]


def test_other_programs_in_this_process_import_as_before(module):
    from jsonargparse import ArgumentParser

    trace = module("stray_seven", DERIVED)
    parser = ArgumentParser()
    parser.add_argument("--rule", type=Rule)
    assert parser.parse_args(["--rule", "stray_seven.Mine"]).rule.class_path == "stray_seven.Mine"
    assert trace.exists()
