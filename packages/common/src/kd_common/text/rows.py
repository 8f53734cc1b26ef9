"""Conversations of chat and instruction files, checked completely before any computation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_common.errors import UserError
from kd_common.text.records import MalformedError, check_text, kind, read_records, unique_keys

ROLES = ("system", "user", "assistant")
FIELDS = ("messages", "instruction", "input", "output", "instances", "system")

ASKED = ("instruction", "prompt", "question")
"""Keys of a row that hold its question, in the order of preference."""

ANSWERED = ("output", "answer", "response", "completion")
"""Keys of a row that hold the answer, in the order of preference."""

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of the roles that differ."""

LEARNT = ("weight", "train", "training", "loss", "loss_weight")
"""Keys of a turn that say whether the loss falls on it: 0 or false, 1 or true."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's turn that hold its reasoning."""

REFUSED_IN_TURNS = {
    "prefix": "an answer that is to be continued cannot be learnt from",
    "partial": "an answer that is to be continued cannot be learnt from",
    "function_call": "write it as tool_calls",
    "refusal": "write it as content",
    "train_detail": "only whole turns can be left out, with weight 0",
    "loss_mask": "only whole turns can be left out, with weight 0",
    "images": "only text can be read",
    "videos": "only text can be read",
    "audios": "only text can be read",
    "audio": "only text can be read",
}
RATED = "answers are not rated; keep the good ones"
REFUSED_IN_ROWS = {
    "rejected": "pairs of answers are not compared; keep the chosen one, as output or messages",
    "rejected_response": "pairs of answers are not compared; keep the chosen one",
    "kto_tag": RATED,
    "history": "write the whole conversation as messages",
    "functions": "write them as tools",
    "chat_template_kwargs": "settings of the template cannot be given by row",
    "image": "only text can be read",
    "images": "only text can be read",
    "videos": "only text can be read",
    "audios": "only text can be read",
}
SYSTEMS = ("system", "system_prompt", "system_message")
"""Keys of a row that hold its system turn."""

WEIGHTS = ("weight", "loss_weight", "sample_weight")
"""Keys of a row that weigh it against others."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: The text.
        input: Material that a user's instruction refers to, kept apart because some layouts head it separately.
        learnt: Whether the loss may fall on it; an assistant's turn of weight 0 is only read.
        more: Further fields for the chat template: `tool_calls`, `reasoning_content`, `name` and so on.
    """

    role: str
    content: str
    input: str = ""
    learnt: bool = True
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Row:
    """A conversation and its place: `file, line 3`.

    Attributes:
        messages: Turns of the conversation.
        source: File and line.
        alternatives: Further answers to its last question. The loss never falls on them; they are references that
            generations are compared with.
        more: Further fields for the chat template: `tools` and `documents`.
    """

    messages: tuple[Message, ...]
    source: str
    alternatives: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def answered(self) -> bool:
        """Return whether the conversation ends with an answer; else it is a prompt."""
        return self.messages[-1].role == "assistant"


def read_rows(path: Path, fields: Mapping[str, str] | None = None) -> list[Row]:
    """Read conversations from JSONL or Parquet.

    A record has one of these forms; the first that fits is used:

    * `messages` or `conversations`: a list of `{role, content}`, or ShareGPT's `{from, value}`; it may end
      with a user's turn, and is then a prompt. `prompt` may be such a list, too.
    * `turns` (MT-bench), a list of a user's texts, of which the first is asked; or `data` (UltraChat), a list of texts
      of user and assistant in turn.
    * `instruction`, `prompt` or `question`, and optionally `input` and `output` (or `answer`, `response`,
      `completion`); without an output it is a prompt. An output may be a list of answers: the first is the one to learn
      from, all are references.
    * `instruction` and `instances`, a list of `{input, output}`: one row per instance.

    In addition, `system` (or `system_prompt`, `system_message`) is a system turn; `tools` and `documents` go to the
    chat template. An output answers messages that end with a user's turn. Fields that ask for something unsupported
    raise; all others are ignored.

    Args:
        path: File ending in .jsonl or .parquet.
        fields: The file's own names of these fields, such as `{"instruction": "question", "output": "answer"}`;
            every record must have a field named here.

    Returns:
        Rows in the order of the file, at least one.

    Raises:
        UserError: If there is no such file.
        RowsError: If the file is not of that format, is empty, or holds malformed rows.
        UserError: If `fields` names something unknown.
    """
    names = dict(fields or {})
    if unknown := set(names) - set(FIELDS):
        raise UserError(f"fields may name {', '.join(FIELDS)}; got {', '.join(sorted(unknown))}")
    return read_records(path, lambda record, source: conversations(record, source, names))


def conversations(record: Mapping[str, Any], source: str, fields: Mapping[str, str]) -> list[Row]:
    """Return the conversations of a record, one but for several instances; see `read_rows`.

    Raises:
        MalformedError: If it holds no conversation, or asks for something unsupported.
    """
    record, fields = _recognised(record, fields)
    more = _row_settings(record, fields)
    system = _system(record, fields)
    turns = _field(record, "messages", fields)
    if turns is None:
        turns = record.get("conversations")
    if turns is not None:
        messages = _answered(turns, chat(turns), _field(record, "output", fields))
        return [Row(_with_system(messages, system), source, more=more)]
    if (instruction := _field(record, "instruction", fields)) is None:
        raise MalformedError(
            "needs prompt, question, instruction, turns, data, messages or conversations; has "
            f"{', '.join(record) or 'nothing'}; rename its fields, or name them for llm_kd with data.fields, such as "
            "{instruction: query, output: reply}"
        )
    instances = _field(record, "instances", fields)
    if instances is None:
        instances = [record]
    elif not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise MalformedError("instances must be a list of objects, at least one")
    rows = []
    for instance in instances:
        asked = _instruction(instruction, _field(instance, "input", fields), _field(instance, "output", fields))
        rows.append(Row(_with_system(asked[0], system), source, asked[1], more))
    return rows


def _recognised(record: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Return a record with its turns as messages, and the names of its question and its answer among the fields."""
    told = fields.keys() & {"messages", "instruction"}
    if not told and all(record.get(key) is None for key in ("messages", "conversations", "instruction")):
        turns, prompt, texts = (record.get(name) for name in ("turns", "prompt", "data"))
        if isinstance(turns, list) and turns:
            record = {**record, "messages": [{"role": "user", "content": turns[0]}]}
        elif isinstance(prompt, list):
            record = {**record, "messages": prompt}
        elif isinstance(texts, list):
            said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            record = {**record, "messages": said}
    known = {"instruction": ASKED} | ({} if _field(record, "instances", fields) else {"output": ANSWERED})
    for name, keys in known.items():
        found = next((key for key in keys if record.get(key) is not None), None)
        if name not in fields and found:
            fields = {**fields, name: found}
    return record, fields


def _row_settings(record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a record passes to the chat template; raise for unsupported ones."""
    named = set(fields.values())
    for key in REFUSED_IN_ROWS.keys() & record.keys() - named:
        if record[key] not in (None, [], "", {}) and not (key == "rejected" and "chosen" in named):
            raise MalformedError(f"has {key!r}: {REFUSED_IN_ROWS[key]}")
    if record.get("label") is False and "label" not in named:
        raise MalformedError(f"has 'label' false: {RATED}")
    for key in WEIGHTS:
        if key not in named and record.get(key) not in (None, 1):
            raise MalformedError(f"has {key!r} {record[key]!r}: rows cannot be weighed; remove it, or the row")
    more = {}
    for key in ("tools", "documents"):
        value = record.get(key)
        if key == "tools" and isinstance(value, str) and value.strip():  # as some files keep them
            value = _json(value, key)
        if value:
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                raise MalformedError(f"{key} must be a list of objects, is {kind(value)}")
            more[key] = value
    return more


def _field(record: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> Any:
    """Return a record's value under the file's own name of a field; None where it has none."""
    if name in fields and fields[name] not in record:
        raise MalformedError(f"has no {fields[name]!r}, which `fields` gives for {name}")
    return record.get(fields.get(name, name))


def chat(turns: Any) -> tuple[Message, ...]:
    """Return the turns of a conversation.

    An assistant's turn before the first user's answers nothing, so the loss does not fall on it. Answers of weight 0 at
    the end are dropped.

    Raises:
        MalformedError: If it is no conversation, or asks for something unsupported.
    """
    if not isinstance(turns, list) or not turns:
        raise MalformedError("messages must be a list of turns, at least one")
    messages: list[Message] = []
    asked = False
    for number, turn in enumerate(turns, 1):
        message = _turn(turn, number, after=messages[-1].role if messages else None)
        asked |= message.role == "user"
        if message.role == "assistant" and not asked:
            message = Message("assistant", message.content, learnt=False, more=message.more)
        messages.append(message)
    if not asked:
        raise MalformedError("a conversation must start with a user's turn, after the system's if there is one")
    while messages[-1].role == "assistant" and not messages[-1].learnt:
        messages.pop()
    return tuple(messages)


def _turn(turn: Any, number: int, after: str | None) -> Message:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else turn
    role = SPEAKERS.get(role, role) if isinstance(role, str) else role
    tool = role == "tool" and after in ("assistant", "tool")
    if not isinstance(turn, dict) or not isinstance(role, str) or not (role in ROLES or tool):
        why = " (a tool's turn answers an assistant's)" if role == "tool" else ""
        raise MalformedError(f"turn {number} must have a role of {', '.join(ROLES)}, got {role!r}{why}")
    if role == "system" and after is not None:
        raise MalformedError(f"turn {number}: a system turn can only come first")
    more = {k: v for k, v in turn.items() if v is not None and k not in ("role", "from", "content", "value", *LEARNT)}
    for key in REFUSED_IN_TURNS.keys() & more.keys():
        if more.pop(key) not in (False, [], "", {}):
            raise MalformedError(f"turn {number} has {key!r}: {REFUSED_IN_TURNS[key]}")
    for key in REASONING:
        if not check_text(more.get(key), f"{key} of turn {number}").strip():
            more.pop(key, None)
        elif role != "assistant":
            raise MalformedError(f"turn {number} has {key!r}, but is not the assistant's")
    if not more.get("tool_calls"):
        more.pop("tool_calls", None)
    elif role != "assistant":
        raise MalformedError(f"turn {number} has 'tool_calls', but is not the assistant's")
    else:
        more["tool_calls"] = [_call(call, number) for call in _listed(more["tool_calls"], number)]
    content = _content(turn.get("content", turn.get("value")), f"the content of turn {number}")
    if not content.strip() and "tool_calls" not in more and role != "tool":
        raise MalformedError(f"turn {number} is empty")
    return Message(role, content, learnt=_learnt(turn, number, role), more=more)


def _learnt(turn: Mapping[str, Any], number: int, role: str) -> bool:
    """Return whether the loss may fall on a turn."""
    asked = {key: turn[key] for key in LEARNT if turn.get(key) is not None}
    for key, value in asked.items():
        if value not in (0, 1) or not isinstance(value, int | float):
            raise MalformedError(f"turn {number} has {key!r} {value!r}: a turn is learnt (1) or not (0)")
        if value and role != "assistant":
            raise MalformedError(f"turn {number} has {key!r} {value!r}, but only an assistant's turn can be learnt")
    if len(set(map(bool, asked.values()))) > 1:
        raise MalformedError(f"turn {number}: {' and '.join(map(repr, asked))} contradict each other")
    return all(asked.values())


def _listed(calls: Any, number: int) -> list[Any]:
    if not isinstance(calls, list):
        raise MalformedError(f"tool_calls of turn {number} must be a list, is {kind(calls)}")
    return calls


def _call(call: Any, number: int) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates write them as JSON, and would quote a text once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedError(f"tool_calls of turn {number} must be objects with a function and its name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of a call in turn {number}")
    function = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "function": function} if "function" in call else function


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} are not JSON: {error}") from error


def _content(value: Any, what: str) -> str:
    """Return a text, or the joined texts of a list of parts."""
    if not isinstance(value, list):
        return check_text(value, what)
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(check_text(part["text"], what))
        elif isinstance(part, str):
            texts.append(check_text(part, what))
        else:
            held = f"of type {part.get('type')!r}" if isinstance(part, dict) else f"that is {kind(part)}"
            raise MalformedError(f"{what} must be text, is a list with a part {held}")
    return "".join(texts)


def _answered(turns: Any, messages: tuple[Message, ...], output: Any) -> tuple[Message, ...]:
    """Return the conversation with the record's separate answer, if its last turn is not an answer."""
    if not output or messages[-1].role == "assistant" or len(messages) < len(turns):
        return messages
    if isinstance(output, list) and all(isinstance(turn, dict) for turn in output):
        return chat([*turns, *output])
    return chat([*turns, {"role": "assistant", "content": check_text(output, "output")}])


def _system(record: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """Return the separate system turn of a record."""
    if "system" in fields:
        return check_text(_field(record, "system", fields), "system")
    found = {key: text for key in SYSTEMS if (text := check_text(record.get(key), key))}
    if len({*found.values()}) > 1:
        raise MalformedError(f"has {' and '.join(map(repr, found))}, which differ; keep one of them")
    return next(iter(found.values()), "")


def _with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Return the conversation behind the separate system turn of its record."""
    if not system.strip():
        return messages
    if messages[0].role != "system":
        return (Message("system", system), *messages)
    if messages[0].content != system:
        raise MalformedError("has a field 'system' and another system turn; keep one of them")
    return messages


def _instruction(instruction: Any, material: Any, output: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    instruction, material = check_text(instruction, "instruction"), check_text(material, "input")
    if not instruction.strip():
        raise MalformedError("instruction is empty")
    question = Message("user", instruction, material if material.strip() else "")
    if not isinstance(output, list):
        answer = check_text(output, "output")
        return ((question, Message("assistant", answer)) if answer.strip() else (question,)), ()
    answers: Sequence[str] = [check_text(value, f"output {number}") for number, value in enumerate(output, 1)]
    if not answers or not all(answer.strip() for answer in answers):
        raise MalformedError("a list of outputs must hold at least one answer, and no empty one")
    return (question, Message("assistant", answers[0])), tuple(answers[1:])
