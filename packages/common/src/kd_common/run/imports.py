"""What a configuration may import: classes of known packages, and of modules that the command line names."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import _actions, _typehints, _util
from jsonargparse._common import NonParsingAction, parent_parser

from kd_common.errors import UserError

FLAG = "--import"
OWN = ("kd_common", "vision_kd", "llm_kd", "spec_decode")
KNOWN = (*OWN, "lightning", "torch", "torchvision", "torchmetrics", "timm", "transformers")
"""Packages of which a configuration may import modules."""

_STANDARD = sys.stdlib_module_names
_asked_for: set[str] = set()


class ImportOption(NonParsingAction):
    """The option in `--help`: `import_asked_for` takes it out of a command line before that is parsed."""


def import_asked_for(args: Sequence[str]) -> list[str]:
    """Import the modules that a command line names with `--import`; return the rest of it.

    Raises:
        UserError: If there is no such module, or one that it imports is not installed.
    """
    rest, words = [], iter(args)
    for word in words:
        if word == FLAG or word.startswith(f"{FLAG}="):
            _import(word.partition("=")[2] if "=" in word else next(words, ""))
        else:
            rest.append(word)
    return rest


def asked_for() -> list[str]:
    """Flags for the modules imported so far, for another process."""
    return [f"{FLAG}={name}" for name in sorted(_asked_for)]


def refuse_imports(setting: str, args: Sequence[str]) -> None:
    """Refuse arguments for other runs that would import modules: they may stand in a file.

    Args:
        setting: What holds them, for the message.
        args: The arguments.

    Raises:
        UserError: Naming the argument.
    """
    if found := [arg for arg in args if arg.partition("=")[0] == FLAG]:
        raise UserError(f"{setting}: {found[0]} is for the command line itself; add it there if you trust that module")


def _import(name: str) -> None:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{FLAG} {name!r}: give the name of a module, as in {FLAG} my_models, without .py or folders")
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name in [*_prefixes(name)]
        what = "no such module" if absent else f"it needs {error.name}, which is not installed"
        raise UserError(
            f"{FLAG} {name}: {what}; modules are looked for in the working directory and among installed packages"
        ) from error
    _asked_for.add(name)


def import_named(path: str) -> Any:
    """Return the object that a configuration names by its path; import nothing for a path that it must not name.

    Args:
        path: Module and name, with dots.

    Raises:
        UserError: For a module that is not loaded, of no known package, and not asked for; for a class of the
            standard library; for anything but a class, unless its module is of this project or asked for.
    """
    module, root = path.rpartition(".")[0], path.partition(".")[0]
    hidden = any(part.startswith("_") for part in module.split("."))
    allowed = _is_asked_for(path) or (root in KNOWN and not hidden) or (root not in _STANDARD and _is_loaded(module))
    if "." in path and not allowed:
        hint = "" if root in _STANDARD else f"; if you trust {module}, add {FLAG} {module} to the command line"
        raise UserError(f"{path} is not of a package that a configuration may name ({', '.join(KNOWN)}){hint}")
    found = _util.import_object(path)
    origin = str(getattr(found, "__module__", None) or "")
    if inspect.isclass(found) and (origin.partition(".")[0] not in _STANDARD or _is_asked_for(origin)):
        return found
    if origin.partition(".")[0] in OWN or _is_asked_for(origin):
        return found
    raise UserError(f"{path} is no class that a configuration may name")


def _is_asked_for(path: str) -> bool:
    return any(prefix in _asked_for for prefix in _prefixes(path))


def _prefixes(path: str) -> Iterator[str]:
    """Return a path and all that it lies in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _is_loaded(module: str) -> bool:
    """Return whether a module, or the class of a loaded module that this may be, needs no import."""
    parent, _, name = module.rpartition(".")
    return module in sys.modules or (parent in sys.modules and name in vars(sys.modules[parent]))


def guard(parser: type) -> None:
    """Let jsonargparse import what a configuration names by `import_named`; it has no setting for that.

    Args:
        parser: Class of the parsers that are guarded; those of other programs in this process are not.
    """

    def guarded(name: str) -> Any:
        return (import_named if isinstance(parent_parser.get(), parser) else _util.import_object)(name)

    def plain(value: Any, *settings: Any) -> Any:
        # A setting of any type holds plain values: a class in it would be of no base that was asked for.
        return value if isinstance(parent_parser.get(), parser) else any_class(value, *settings)

    any_class: Callable[..., Any] = _typehints.adapt_classes_any
    _typehints.import_object = _actions.import_object = guarded
    _typehints.adapt_classes_any = plain
