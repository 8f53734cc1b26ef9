"""Errors of a command line in one line that names the setting, what is wrong with it, and what may have been meant.

jsonargparse prints the usage, which is a hundred lines for a run, and then its way through classes and unions of types.
"""

import inspect
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, Namespace, _typehints
from jsonargparse._common import parent_parser

from kd_common.errors import UserError
from kd_common.registry import subclasses, suggest
from kd_common.run.imports import FLAG, ImportOption, guard, import_asked_for, import_named
from kd_common.run.settings_text import check_config_files, keep_text
from kd_common.terminal import printable

# What only says on which way the parser came to the cause.
_WAY = re.compile(
    "Parser key |Does not validate against |Subtypes: |Errors:$|Problem with given class_path |Given value|"
    r"Expected a path but |Expected a <class 'NoneType'>$|Subclass types expect one of:|a class path \(str\)$|"
    r"a dict with class_path entry$|a dict without class_path but |a dict with parameters accepted by "
)
_CONTAINER = re.compile(
    r"Expected a <class '(?:collections\.abc\.)?(list|tuple|Sequence|dict|Mapping)'>(\. Got value: (.*))?"
)
_UNKNOWN = re.compile(r"(?:Group '(.*)' does not accept o|O)ption '(.*?)'(?: is not accepted)?")


class CommandParser(ArgumentParser):
    """A parser whose errors are short.

    Attributes:
        example: Arguments that a command which needs some may be given, shown where they are missing.
        note: What to add where a class has no such setting; empty for nothing.
    """

    example = ""
    note = ""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.exit_on_error:  # the parsers of nested classes raise instead
            about = "Import this module first, for classes of your own; repeat it for several."
            self.add_argument(FLAG, action=ImportOption, metavar="MODULE", default=SUPPRESS, help=about)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line, after the imports that it asks for."""
        try:
            args = import_asked_for(sys.argv[1:] if args is None else args)
            check_config_files(args)
        except ValueError as error:
            self.error(str(error))
        return super().parse_args(args, *rest, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with code 2; parsers of nested classes raise instead."""
        if not self.exit_on_error:
            super().error(by_flag(message, self._option_string_actions), ex)
        if found := _UNKNOWN.fullmatch(message):  # in a file
            message = f"Unrecognized arguments: --{'.'.join(filter(None, found.groups()))}"
        message = readable(by_flag(message, self._option_string_actions))
        # One that is linked to another is asked for its type before it is missed.
        if (found := re.fullmatch(r"--(\S+): must not be null.*", message)) and found[1] in self.required_args:
            message = f"--{found[1]} is required"
        if self.example and message.endswith(" is required"):
            message += f", as in: {self.prog} {self.example}"
        super().error(printable(message + self.note if "has no setting" in message else message), ex)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the error's last line would be out of sight, and the tip beside it names `--help`."""


guard(CommandParser)
keep_text(CommandParser)
_no_type_fits = _typehints.raise_union_unexpected_value


def _objection(subtypes: Any, val: Any, exceptions: list[Exception]) -> NoReturn:
    """Raise what the one type of an optional setting objects to; jsonargparse lists it beside that None is expected."""
    if not isinstance(parent_parser.get(), CommandParser):  # of another program in this process
        _no_type_fits(subtypes, val, exceptions)
    causes = {kind: error for kind, error in zip(subtypes, exceptions, strict=True) if kind is not type(None)}
    name: Any = val.get("class_path") if isinstance(val, dict | Namespace) else val
    for kind in causes if isinstance(name, str) else ():
        if inspect.isclass(kind) and kind.__module__ != "builtins":
            names = subclasses(kind)
            if "." not in name and name not in names:
                raise ValueError(f"no such {kind.__name__}{suggest(name, names)} (known: {', '.join(names)})")
    if len(causes) == 1 and not isinstance(val, _typehints.NestedArg):
        raise next(iter(causes.values()))
    _no_type_fits(subtypes, val, exceptions)


_typehints.raise_union_unexpected_value = _objection


def by_flag(message: str, options: Collection[str]) -> str:
    """Return a message on missing or unknown options by their flags, with known ones that are close.

    Args:
        message: jsonargparse's.
        options: All option strings, such as `--trainer.max_epochs`.
    """
    if found := re.match(r"Option '(.*)' is required", message):
        flag = f"--{found[1]}"
        return f"{flag if flag in options else found[1]} is required"
    if not message.startswith("Unrecognized arguments: ") or "; did you mean" in message:  # by an inner parser
        return message
    options = [option for option in options if not option.endswith(("+", ".help"))]  # jsonargparse's own
    hints = []
    for flag in re.findall(r"(--[\w.]+)", message):
        group, _, name = flag.rpartition(".")
        within = [option.removeprefix(f"{group}.") for option in options if group and option.startswith(f"{group}.")]
        hints.append(suggest(name, within) if within else suggest(flag.partition(".")[0], options))
    return message + "".join(dict.fromkeys(hints))


def readable(message: str) -> str:
    """Return the setting and the causes of a message of jsonargparse; other messages stay as they are."""
    keys = re.findall(r'Parser key "([^"]+)":', message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    causes = dict.fromkeys(line for line in lines if line and not _WAY.match(line))
    if not keys or not causes:
        return message
    keys = [key for key, _ in groupby(keys)]
    nested = re.search(r"Given value: NestedArg\(key='(.*)', val=", message)  # the innermost, which comes first
    if nested and nested[1] != keys[-1]:
        keys.append(nested[1])
    if missing := re.fullmatch(r"--(\S+) is required", next(iter(causes))):
        return f"--{'.'.join([*keys, missing[1]])} is required"
    value = re.search(r"^ *Given value: (?!NestedArg|Namespace|\{)(.*)$", message, flags=re.M)
    given = f" {value[1]}" if value else ""
    return f"--{'.'.join(keys)}{given}: {'; '.join(_explained(cause, message, given.strip()) for cause in causes)}"


def _explained(cause: str, message: str, given: str) -> str:
    """Return a cause with the names that could stand there, or with how it is written."""
    if found := _CONTAINER.fullmatch(cause):
        value = found[3] or given
        plain = bool(value) and not re.search(r"[\[\]{}'\"]", value)
        if found[1] in ("dict", "Mapping"):
            return f"Expected a dict, as in '{{name: {value if plain else 'value'}}}'{found[2] or ''}"
        return f"Expected a list, as in '[{value if plain else 'a, b'}]'{found[2] or ''}"
    if re.match(r"Expected a .*\. Got value: None$", cause):
        return "must not be null; give a value, or leave it out for the default"
    if cause.startswith("Expected a <class 'str'>. Got value: "):
        return f"{_readable_types(cause)}; text that YAML takes for something else stands in quotes"
    if found := re.match(r"Option '(.*)' is not accepted", cause):
        (*_, owner) = re.findall(r"given class_path '(.*)'", message)
        return f"{owner} has no setting {found[1]!r}{suggest(found[1], _parameters(import_named(owner)))}"
    if found := _UNKNOWN.fullmatch(cause):
        return f"{found[1]} has no setting {found[2]!r}"
    if re.match(
        "Not a valid subclass|'.*' object has no attribute 'keys'|argument of type |Unable to load conf", cause
    ):
        return "expected settings by name, or class_path with the name of a class and init_args with its settings"
    return _readable_types(cause)


def _readable_types(cause: str) -> str:
    return re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", cause)


def _parameters(owner: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class, with those that it hands on to its bases."""
    makers = [vars(base)["__init__"] for base in reversed(owner.__mro__[:-1]) if "__init__" in vars(base)]
    return {name: parameter for init in makers for name, parameter in inspect.signature(init).parameters.items()}


def _chosen(config: Namespace, key: str = "") -> Iterator[tuple[str, dict[str, inspect.Parameter], Namespace]]:
    """Yield key, parameters and settings of every class that a configuration names, and of their groups of settings."""
    for name, value in vars(config).items():
        path = f"{key}.{name}" if key else name
        if isinstance(value, Namespace):
            if "class_path" in value:
                owner, value = value["class_path"], value.get("init_args", Namespace())
                parameters = _parameters(import_named(owner))
                yield path, parameters, value
                for inner, settings in vars(value).items():
                    hint = parameters[inner].annotation if inner in parameters else None
                    groups = [member for member in (hint, *get_args(hint)) if isinstance(member, type)]
                    if isinstance(settings, Namespace) and (group := next(filter(is_dataclass, groups), None)):
                        yield f"{path}.{inner}", _parameters(group), settings
            yield from _chosen(value, path)


def null_settings(config: Namespace) -> list[str]:
    """Return settings that are null though their class has another default; jsonargparse allows null for every type.

    Args:
        config: A parsed configuration.
    """
    found = []
    for path, parameters, settings in _chosen(config):
        nulls = [name for name, value in vars(settings).items() if value is None]
        # One without a default is linked, and filled in later.
        known = [n for n in nulls if n in parameters]
        found += [f"{path}.{n}" for n in known if parameters[n].default not in (None, inspect.Parameter.empty)]
    return found


def check_groups(config: Namespace) -> None:
    """Refuse a plain value in place of a group of settings; jsonargparse lets it pass where all have defaults.

    Args:
        config: A parsed configuration.

    Raises:
        UserError: Naming the group and what it may hold.
    """
    for path, parameters, settings in _chosen(config):
        for name, value in vars(settings).items():
            # A setting that a class hands on as a keyword is none of its own parameters.
            group = parameters[name].annotation if name in parameters else None
            if is_dataclass(group) and not isinstance(value, Namespace | None):
                names = ", ".join(field.name for field in fields(group))
                raise UserError(f"--{path}.{name} {value!r}: expected settings by name ({names})")


def check_accelerator(name: Any) -> None:
    """Refuse a GPU where there is none; Lightning's error names neither the setting nor the hint.

    Raises:
        UserError: If PyTorch finds no GPU.
    """
    import torch  # seconds, which a mistyped option need not wait for

    if name in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError(
            f"--trainer.accelerator {name}: PyTorch {torch.__version__} finds no GPU here; set it to auto or cpu, or "
            "check the driver and that this build of PyTorch is for it"
        )


def check_folder(flag: str, path: str | Path) -> None:
    """Refuse the name of a file where a folder is to be written.

    Raises:
        UserError: Naming the flag.
    """
    if (file := next((p for p in (Path(path), *Path(path).parents) if p.exists()), None)) and not file.is_dir():
        raise UserError(f"{flag} {path}: {file} is a file; name a folder")


def check_file(flag: str, path: str | Path) -> None:
    """Refuse the name of a folder where a file is to be written, or one inside a file.

    Raises:
        UserError: Naming the flag.
    """
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    check_folder(flag, Path(path).parent)


def check_batch_size(rows: int, what: str, batch_size: int, world_size: int) -> None:
    """Refuse training data that do not fill one batch on each process.

    Args:
        rows: How many there are.
        what: What they are called, such as "training images".
        batch_size: `data.batch_size`.
        world_size: Number of processes.

    Raises:
        UserError: If they do not; the message says how large a batch may be.
    """
    if rows < batch_size * world_size:
        each = f" on each of {world_size} processes" if world_size > 1 else ""
        raise UserError(
            f"data.batch_size {batch_size}: the {rows:,} {what} do not fill one batch{each}; lower it to at most "
            f"{rows // world_size}"
        )


def default_device() -> str:
    """Return a GPU if there is one, else the processor."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Refuse a `--device` that this machine does not have.

    Raises:
        UserError: If PyTorch cannot use it.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from builds for other hardware
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here; set it to cpu, or check the driver ({reason})"
        ) from error


def check_world_size(size: int) -> None:
    """Refuse a run that torchrun started more often than it has devices: every process would do and write all of it.

    Args:
        size: Devices of the run, on all nodes.

    Raises:
        UserError: If torchrun started another number of processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ and launched != size:
        raise UserError(
            f"torchrun started {launched} processes, and trainer.devices times trainer.num_nodes is {size}: set "
            "--trainer.devices to --nproc_per_node and --trainer.num_nodes to --nnodes"
        )
