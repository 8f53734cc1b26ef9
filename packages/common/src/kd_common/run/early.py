"""`--help` and mistyped options, answered from stored text before PyTorch and Lightning are imported.

The text of every command lies in the folder `help` of its package; a test compares it with what the parser prints.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

STORED = "help"
CONFIGS = "{configs}"
"""Stands in a stored text for the folder of the packaged configurations."""

DECIDE = ("lightning", "jsonargparse")
"""Packages whose options are among those of a command: with other versions the parser itself answers."""

WIDTH = "80"
_OPTION = re.compile(r"^  (-.*?)(?:   |$)")


def versions() -> str:
    """First line of a stored text."""
    return " ".join(f"{name}=={version(name)}" for name in DECIDE)


def stored_help(command: str) -> Path:
    """File of a command's help, such as `vision_kd/help/fit.txt` for `vision_kd.fit`."""
    package, _, name = command.rpartition(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / STORED / f"{name}.txt"


def answer_early(command: str) -> None:
    """Leave with the help that `sys.argv` asks for, or with an error for options that do not exist.

    Args:
        command: Module that is run, such as `vision_kd.fit`.

    Raises:
        SystemExit: With 0 after the help, with 2 after an error; else nothing happens, and the parser decides.
    """
    args, file = sys.argv[1:], stored_help(command)
    try:
        made_with, _, text = file.read_text().partition("\n")
        if made_with != versions():
            return
    except (OSError, PackageNotFoundError):
        return
    if {"-h", "--help"} & {*args}:
        print(text.replace(CONFIGS, str(file.parents[1] / "configs")), end="")
        raise SystemExit(0)
    options, nested = options_of(text)
    unknown = [
        arg for arg in args if (flag := arg.partition("=")[0]).startswith("--") and not _exists(flag, options, nested)
    ]
    if unknown:
        _refuse(unknown, options, prog=f"python -m {command}")


def options_of(text: str) -> tuple[set[str], set[str]]:
    """Return all options that a help lists, and those that take settings below their name: classes and mappings."""
    options: set[str] = set()
    nested: set[str] = set()
    last: list[str] = []
    for line in text.splitlines():
        if found := _OPTION.match(line):
            last = re.findall(r"(?<![\w.])--[\w.+]+", found[1])
            options |= {*last}
            nested |= {option.removesuffix(".help") for option in last if option.endswith(".help")}
        elif "dict[" in line or "Mapping[" in line:
            nested |= {*last}
    return options, nested


def _exists(flag: str, options: set[str], nested: set[str]) -> bool:
    return flag in options or flag == "--" or any(flag.startswith(f"{option}.") for option in nested)


def _refuse(unknown: list[str], options: set[str], prog: str) -> NoReturn:
    from kd_common.run.messages import by_flag  # jsonargparse, a quarter of a second

    message = by_flag(f"Unrecognized arguments: {' '.join(unknown)}", options)
    print(f"tip: For details of accepted options run: {prog} --help\nerror: {message}", file=sys.stderr)
    raise SystemExit(2)
