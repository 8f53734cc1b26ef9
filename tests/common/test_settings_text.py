"""Text on a command line is text; YAML files are bounded, and nothing in them is dropped."""

import contextlib
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_common.run.messages import CommandParser
from kd_common.run.settings_text import check_yaml, load_yaml, read_settings

ODD = ["1e3", "yes", "# x", "a: b", "[x]", "{x}", "@file", "- x", "", "-", "~", "2026-01-01", "a\nb", " # y", "'q'"]
ODD += [
    '"q"',
    "!!python/x",
    "&a",
    "*a",
    "%x",
    "x #y",
    "None",
    "${x}",
    "\t",
    "  ",
    "[a: b",
    "a: b: c",
    "0x1",
    "1_0",
    ":",
]


class Part:
    """A replaceable part.

    Args:
        name: A name.
    """

    def __init__(self, name: str | None = "part") -> None:
        self.name = name


class Data:
    """Data.

    Args:
        system: Text or nothing.
        title: Text.
        stop: Texts.
        part: A part.
        table: Texts by name.
        count: A number.
        mixed: A number or text.
    """

    def __init__(
        self,
        system: str | None = "default",
        title: str = "",
        stop: list[str] | None = None,
        part: Part | None = None,
        table: dict[str, str] | None = None,
        count: int | None = 1,
        mixed: int | str | None = 1,
    ) -> None:
        self.system = system


@dataclass
class Spec:
    """Settings that belong together."""

    name: str | None = None


@cache
def make_parser():
    parser = CommandParser(prog="python -m x")
    parser.add_argument("--config", action="config")
    parser.add_argument("--prompt", type=str)
    parser.add_argument("--system", type=str | None, default="default")
    parser.add_argument("--path", type=Path | None)
    parser.add_argument("--stop", type=list[str] | None)
    parser.add_argument("--both", type=list[str] | str | None)
    parser.add_argument("--any", type=dict[str, Any] | None)
    parser.add_argument("--spec", type=Spec | None)
    parser.add_class_arguments(Data, "group")
    parser.add_subclass_arguments(Data, "data")
    return parser


def parse(*args):
    """The settings, as read, as dumped and read again, and as they reach the classes."""
    parser, said = make_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(["--data=Data", "--data.part=Part", *args])
    except SystemExit:
        raise ValueError(said.getvalue()) from None
    again = make_parser().parse_string(parser.dump(found, skip_none=False))
    again.config = found.config
    assert again == found
    return found


PLACES = {
    "prompt": "prompt",
    "system": "system",
    "spec.name": "spec.name",
    "group.system": "group.system",
    "group.title": "group.title",
    "data.system": "data.init_args.system",
    "data.init_args.system": "data.init_args.system",
    "data.title": "data.init_args.title",
    "data.part.name": "data.init_args.part.init_args.name",
    "data.table.key": "data.init_args.table",
    "group.table.key": "group.table",
}


@pytest.mark.parametrize("text", ODD)
def test_text_is_taken_as_it_was_written(text):
    found = [parse(*(f"--{flag}={text}" for flag in PLACES))]
    if not text.startswith("-"):  # argparse takes it for an option
        found.append(parse(*(word for flag in PLACES for word in (f"--{flag}", text))))
    for flag, place in PLACES.items():
        values = [settings[place] for settings in found]
        assert [value["key"] if "table" in flag else value for value in values] == [text] * len(values)


ANY = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(ANY.filter(lambda text: text != "null"))
@settings(max_examples=40, deadline=None)
def test_any_text_is_taken_as_it_was_written(text):
    found = make_parser().parse_args([f"--prompt={text}", f"--system={text}", f"--group.system={text}"])
    assert [found.prompt, found.system, found.group.system] == [text] * 3


def test_null_is_none_where_the_type_allows_it_and_text_elsewhere():
    found = parse("--system=null", "--prompt=null", "--data.system=null", "--group.count=null", "--data.title=null")
    assert (found.system, found.data.init_args.system, found.group.count) == (None, None, None)
    assert (found.prompt, found.data.init_args.title) == ("null", "null")


def test_text_reaches_the_classes_unchanged():
    parser = make_parser()
    found = parser.parse_args(["--data=Data", "--data.system=# Be brief", "--data.part=Part", "--data.part.name=# x"])
    assert parser.instantiate_classes(found).data.system == "# Be brief"


def test_paths_are_taken_as_they_were_written():
    for text in filter(None, ODD):
        assert make_parser().parse_args([f"--path={text}"]).path == Path(text)


@pytest.mark.parametrize("flag", ["stop", "both", "group.stop", "data.stop"])
def test_elements_of_lists_are_text(flag):
    place = "data.init_args.stop" if flag.startswith("data") else flag
    assert parse(f"--{flag}=[a, 1e3, yes, null, '# x', \"a: b\"]")[place] == ["a", "1e3", "yes", "null", "# x", "a: b"]
    assert parse(f"--{flag}+=# x", f"--{flag}+=1e3", f"--{flag}+=[b, 2]")[place] == ["# x", "1e3", "b", "2"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--stop=# x"], "--stop: .*null for none"),
        (["--stop=x"], r"--stop.*: Expected a list, as in '\[x\]'"),
        (["--stop=[a: b]"], "--stop.*stands in quotes"),
        (["--stop=[a"], "--stop"),
        (["--group.count=# x"], r"--group\.count: .*null for none"),
        (["--data.count=&a"], r"--data\.count: .*null for none"),
        (["--group.count="], r"--group\.count"),
        (["--path="], "--path: Expected a path, got an empty text"),
    ],
)
def test_what_is_no_value_of_the_type_is_refused(args, said):
    with pytest.raises(ValueError, match=said):
        parse(*args)


def test_text_that_may_be_a_number_is_text_where_it_is_none():
    found = parse("--group.mixed=# x", "--data.mixed=3", "--both=[a", "--any={a: {b: # x\n 1}}")
    assert (found.group.mixed, found.data.init_args.mixed, found.both, found.any) == ("# x", 3, "[a", {"a": {"b": 1}})


def test_quoted_text_in_a_file_is_that_text(tmp_path):
    for text in (*ODD, "null"):
        block = {"system": text, "data": {"class_path": "Data", "init_args": {"system": text}}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(block, default_style='"'))
        found = make_parser().parse_args(["--config", str(tmp_path / "c.yaml")])
        assert (found.system, found.data.init_args.system) == (text, text)


@pytest.mark.parametrize("value", ["yes", "1e3", "3", "[x]", "{a: b}"])
def test_text_that_a_file_gives_otherwise_is_told_to_stand_in_quotes(tmp_path, value):
    for name, key in (("prompt", "prompt"), ("group: {title", "group.title")):
        (tmp_path / "c.yaml").write_text(f"{name}: {value}{'}' * name.count('{')}")
        with pytest.raises(ValueError, match=rf"--{key}.* stands in quotes"):
            parse("--config", str(tmp_path / "c.yaml"))


def test_a_date_in_a_file_is_text(tmp_path):
    (tmp_path / "c.yaml").write_text("prompt: 2026-01-01")
    assert parse("--config", str(tmp_path / "c.yaml")).prompt == "2026-01-01"


# ---------------------------------------------------------------- bounds

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "line 6: more than 1,000,000 values, as its aliases repeat them"),
        ("a: " + "[" * 100_000, "nest(ed more than 100 deep|ing depth)"),
        ("{a: " * 5_000, "line 1: nested more than 100 deep"),
        ("a: &a [*a]", r"line 1: \*a contains itself"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
        ("m:\n  a: 1\n  a: 3", "line 3: 'a' is given twice"),
        ("m: {a: 1, 'a': 3}", "line 1: 'a' is given twice"),
        ("a: b: c", "not a readable YAML file.* stands in quotes"),
        ("", "must hold settings by name, .* holds nothing"),
        ("x", "holds str"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: \x00", "not a readable YAML file"),
    ],
)
def test_a_file_out_of_bounds_is_refused(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        read_settings(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=f"(?s)--config {tmp_path}/c.yaml: .*"):
        parse(f"--config={tmp_path / 'c.yaml'}")


@pytest.mark.parametrize("content", [bytes(range(256)), b"\xff\xfea", "a: 1".encode("utf-16")])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable YAML file"):
        read_settings(tmp_path / "c.yaml")


def test_a_folder_and_a_huge_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        read_settings(tmp_path)
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(2**33)  # takes no room on the disk
    with pytest.raises(ValueError, match="bytes, which no file of settings has"):
        read_settings(tmp_path / "c.yaml")


def test_ordinary_yaml_is_within_bounds():
    check_yaml("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: *a}\nc:\n- {x: 1}\n- {x: 2}\n'1': a\n")
    check_yaml("a: 1\n---\na: 2\n")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("010", "010"),
        ("1:30", "1:30"),
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e3", 1000.0),
    ],
)
def test_whole_numbers_are_what_they_look_like(written, read):
    assert load_yaml(f"epochs: {written}") == {"epochs": read}
