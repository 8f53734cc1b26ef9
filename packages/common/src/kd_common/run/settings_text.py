"""How settings are read: text stays text, and a YAML file is bounded before anything is built from it."""

import itertools
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import _typehints, get_loader, set_dumper, set_loader
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._common import parent_parser
from jsonargparse._loaders_dumpers import dump_yaml_kwargs, get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint

from kd_common.errors import UserError

NULL = "null"
MAX_BYTES, MAX_NODES, MAX_DEPTH = 2**24, 10**6, 100
"""What a file of settings may hold; the nodes are counted as its aliases repeat them."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnreadableError(yaml.YAMLError):
    """YAML that is not read though it may be valid; the message says where and why."""


def check_yaml(text: str) -> None:
    """Refuse YAML that would grow out of bounds, or in which a setting is given twice; nothing is built.

    Args:
        text: What is to be loaded.

    Raises:
        yaml.YAMLError: With the line.
    """
    sizes: dict[str, int] = {}  # nodes below an anchor
    open_nodes: list[_Open] = [_Open(None, set())]
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (node.anchor for node in open_nodes):
                raise UnreadableError(f"line {line}: *{event.anchor} contains itself")
            open_nodes[-1].add(sizes.get(event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent):
            if (keys := open_nodes[-1].keys) is not None and open_nodes[-1].at_key and event.value != "<<":
                if event.value in keys:
                    raise UnreadableError(f"line {line}: {event.value!r} is given twice")
                keys.add(event.value)
            open_nodes[-1].add(1)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) > MAX_DEPTH:
                raise UnreadableError(f"line {line}: nested more than {MAX_DEPTH} deep")
            open_nodes.append(_Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = open_nodes.pop()
            open_nodes[-1].add(done.nodes + 1)
            if done.anchor:
                sizes[done.anchor] = done.nodes + 1
        if open_nodes[-1].nodes > MAX_NODES:
            raise UnreadableError(f"line {line}: more than {MAX_NODES:,} values, as its aliases repeat them")


class _Open:
    """A mapping (with the keys so far) or a list that is being read, and the number of nodes in it."""

    def __init__(self, anchor: str | None, keys: set[str] | None) -> None:
        self.anchor, self.keys, self.nodes, self.at_key = anchor, keys, 0, True

    def add(self, nodes: int) -> None:
        self.nodes += nodes
        self.at_key = not self.at_key


def load_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, within bounds.

    Raises:
        yaml.YAMLError: See `check_yaml`.
    """
    check_yaml(text)
    return _load_unbounded(text)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        ValueError: If it is no file, too large, no text in UTF-8, no YAML or holds no settings; without its name.
    """
    if not path.is_file():
        raise UserError("not a file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"not read: it has more than {MAX_BYTES:,} bytes, which no file of settings has")
    try:
        content = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:  # broken UTF-8, too
        hint = "; text that holds ': ' or ' #' stands in quotes" if isinstance(error, yaml.MarkedYAMLError) else ""
        raise UserError(f"not a readable YAML file ({error}{hint})") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"must hold settings by name, such as `trainer: {{...}}`, holds {found}")
    return content


def check_config_files(args: Sequence[str]) -> None:
    """Refuse configuration files that hold no settings, by name; jsonargparse would show their content instead.

    Args:
        args: Command line.

    Raises:
        ValueError: See `read_settings`.
    """
    flags = itertools.pairwise([*args, ""])
    for path in (following if arg in ("--config", "-c") else arg.partition("--config=")[2] for arg, following in flags):
        if path:
            try:
                read_settings(Path(path))
            except ValueError as error:
                raise UserError(f"--config {path}: {error}") from error


class Typed(str):
    """Text as it was written on a command line."""


def typed_value(text: str, hint: Any, append: bool = False) -> Any:
    """Return the value of a text for the type of its option: the text itself, wherever the type allows it.

    `null` is None where the type allows that. In `[...]` and `{...}` for lists and dicts of text the elements
    are text, too.

    Args:
        text: As it was written.
        hint: Type of the option.
        append: Whether it is to be added to a list.

    Returns:
        The value, or NotImplemented where YAML decides: for numbers, classes and the like.

    Raises:
        ValueError: For YAML that says nothing, as a comment does, where null may be meant.
    """
    members = set(_members(hint))
    texts = {member for member in members if _is_text(member)}
    holders = {member for member in members if _holds_text(member)}
    if text == NULL and type(None) in members:
        return None
    if holders and append and not text.lstrip().startswith("["):
        return [text]
    only_text = members <= texts | {type(None)}
    if not only_text and members & {type(None), Any} and _says_nothing(text):
        if members & {str, Any}:
            return text
        raise ValueError(f"Expected a value, or {NULL} for none. Got value: {text!r}")
    if holders and members <= texts | holders | {type(None)} and text.lstrip()[:1] in ("[", "{"):
        try:
            check_yaml(text)
            return yaml.load(text, Loader=yaml.BaseLoader)  # makes nothing but text, lists and dicts
        except yaml.YAMLError as error:
            if not texts:
                raise ValueError(f"{error}; an element that holds ': ', ' #' or brackets stands in quotes") from error
    if not texts or members - texts - holders - {type(None)}:
        return NotImplemented
    if str not in texts and not text:
        raise ValueError("Expected a path, got an empty text")
    return text if str in texts else Path(text)


def _members(hint: Any) -> Iterator[Any]:
    """Types of a union, or the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _is_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, type) and issubclass(hint, PurePath))


def _holds_text(hint: Any) -> bool:
    holders = _typehints.sequence_or_mapping_origin_types | _typehints.tuple_set_origin_types
    inner = [member for member in get_args(hint) if member is not Ellipsis]
    return get_origin(hint) in holders and bool(inner) and all(map(_is_text, inner))


def _says_nothing(text: str) -> bool:
    """Return whether YAML reads a text as null though it is not written as one."""
    if text.strip().lower() in ("", "~", NULL):
        return False
    try:
        return load_yaml(text) is None
    except yaml.YAMLError:
        return False


def keep_text(parser: type) -> None:
    """Let jsonargparse read command lines by `typed_value`, and take text in files as it is.

    Args:
        parser: Class of the parsers that do so; those of other programs in this process take text as they did.
    """
    call, check, adapt = ActionTypeHint.__call__, ActionTypeHint._check_type, _typehints.adapt_typehints
    load_config = _ActionConfigLoad._load_config

    def marked_call(self: Any, *args: Any, **settings: Any) -> Any:
        if len(args) != 4 or not isinstance(parent_parser.get(), parser) or not isinstance(args[2], str):
            return call(self, *args, **settings)
        command, config, text, option = args
        prefix = f"--{self.dest}."
        inner = str(option).removeprefix(prefix) if str(option).startswith(prefix) else ""
        members = [*_members(self._typehint)]
        if inner and any(get_origin(member) in _typehints.mapping_origin_types for member in members):
            if any(map(_holds_text, members)):
                held = config.get(self.dest) if isinstance(config.get(self.dest), dict) else {}
                return call(self, command, config, held | {inner: text}, f"--{self.dest}")
        elif inner not in ("class_path", "init_args", "dict_kwargs"):
            text = Typed(text)
        return call(self, command, config, text, option)

    def check_type(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        if isinstance(value, Typed):
            text = str(value)
            try:
                found = typed_value(text, self._typehint, append)
            except ValueError as error:
                raise TypeError(f'Parser key "{self.dest}":\n  {error}') from error
            if found is None or isinstance(found, str | PurePath):
                return found
            value = text if found is NotImplemented else found
        elif isinstance(value, str) and isinstance(parent_parser.get(), parser):
            hint = self._typehint
            if _only_text(hint) or (str in _members(hint) and _says_nothing(value)):
                return _as_text(value, hint)
        return check(self, value, append=append, cfg=cfg, mode=mode)

    def adapt_typehints(value: Any, hint: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(value, str) and isinstance(parent_parser.get(), parser):
            if _only_text(hint):
                return value if settings.get("serialize") else _as_text(value, hint)
            if hint is type(None) and value != NULL:  # jsonargparse takes a comment for null
                raise ValueError(f"Expected a {hint}. Got value: {value}")
        return adapt(value, hint, *args, **settings)

    def load_settings(self: Any, value: Any, *args: Any) -> Any:
        # jsonargparse looks for YAML in plain text only.
        return load_config(self, str(value) if isinstance(value, Typed) else value, *args)

    ActionTypeHint.__call__ = marked_call  # type: ignore[method-assign]
    _ActionConfigLoad._load_config = load_settings  # type: ignore[method-assign]
    ActionTypeHint._check_type = check_type  # type: ignore[method-assign]
    _typehints.adapt_typehints = adapt_typehints  # type: ignore[assignment]


def _only_text(hint: Any) -> bool:
    """Return whether a type takes text and nothing else but null; jsonargparse reads that as YAML, again and again."""
    members = {*_members(hint)} - {type(None)}
    return bool(members) and all(map(_is_text, members))


def _as_text(value: str, hint: Any) -> Any:
    return value if str in _members(hint) else Path(value)


INT = "tag:yaml.org,2002:int"
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
"""Whole numbers in a file. YAML 1.1 takes 010 for 8 and 1:30 for 90; as text, a command line's rules hold."""

_Settings: Any = get_yaml_default_loader()
_Settings.yaml_implicit_resolvers = {
    first: [(tag, _WHOLE if tag == INT else pattern) for tag, pattern in resolvers]
    for first, resolvers in _Settings.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text jsonargparse's loader would take for something else, such as 1e3."""


_resolvers = _Settings.yaml_implicit_resolvers
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers}
}
_load_unbounded = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))
set_dumper("yaml", lambda data: yaml.dump(data, Dumper=_Dumper, **dump_yaml_kwargs))
