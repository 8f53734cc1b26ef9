"""Chat templates: a default one, a fixed date, and limits for downloaded ones."""

import datetime
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from kd_common.errors import UserError

INSTRUCTION_TEMPLATE = (
    "{% if add_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{% if message.input %}{{ '### Input:\n' + message.input + '\n\n' }}{% endif %}"
    "{% else %}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""Layout for tokenizers without a chat template, such as GPT-2's, with Alpaca's headings.

A system turn comes first, unchanged.
"""

DATE = datetime.datetime(2025, 1, 1)
"""Date in every prompt whose template prints today's; otherwise all sequences and cache keys would change overnight."""

_CODES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "AaBbCcDdeFGgHhIjklMmPpRrSTUuVWwXxYyZz"]
_FORMATTED = "".join(f".replace('{code}', '{DATE.strftime(code)}')" for code in _CODES)
# The line end keeps the start of a template as it is: jinja cuts one behind a block, and blanks before one.
FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_FORMATTED} }}}}{{% endmacro %}}\n"
"""Prefix that makes a template print `DATE`."""

SECONDS, BYTES, CHARACTERS = 5, 2**30, 1_000_000
"""Limits of time, memory and output for the short conversations on which a template is tried; seconds of computing."""

WAIT = 120.0
"""Seconds of wall time after which a template is given up, on a busy machine."""

_TOO_MUCH_MEMORY, _TOO_MUCH_TEXT, _BY_CHANCE = 3, 4, 5
_tried: set[str] = set()


def check_template(template: str, render: Callable[..., str], name: str) -> None:
    """Raise for a template that does not end, writes without end or depends on chance: it is a program of others.

    The template is tried in a separate process with limits on time and memory.

    Args:
        template: The template, by which it is remembered.
        render: Renders a conversation with it, as `render(turns, prompt=True)`.
        name: Name of the template's model, for the message.

    Raises:
        UserError: If it exceeds a bound, or writes the same conversation in several ways; the model is named.
    """
    if template in _tried or "fork" not in multiprocessing.get_all_start_methods():
        return
    child = multiprocessing.get_context("fork").Process(target=_try, args=(render,))
    with warnings.catch_warnings():  # the child touches no state that other threads may hold
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(WAIT)
    problem = None
    if child.is_alive() or child.exitcode == -signal.SIGXCPU:
        child.kill()
        child.join()
        problem = f"does not end within {SECONDS:g} s"
    elif child.exitcode == _TOO_MUCH_TEXT:
        problem = f"writes more than {CHARACTERS:,} characters"
    elif child.exitcode == _TOO_MUCH_MEMORY:
        problem = f"needs more than {BYTES / 2**30:g} GiB of memory"
    elif child.exitcode == _BY_CHANCE:
        problem = "writes something else each time"
    if problem:
        raise UserError(
            f"the chat template of {name} {problem} about a short conversation. It is broken or hostile: set the "
            "tokenizer's chat_template to another one"
        )
    _tried.add(template)


def _try(render: Callable[..., str]) -> None:
    """Render some conversations under limits on time and memory; the exit code names the exceeded one."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    for turns in _conversations():
        for prompt in (True, False):
            try:
                text, again = (render(turns, prompt=prompt) for _ in range(2))
            except MemoryError:
                os._exit(_TOO_MUCH_MEMORY)
            except Exception:  # the caller reports errors
                continue
            if len(text) > CHARACTERS:
                os._exit(_TOO_MUCH_TEXT)
            if text != again:
                os._exit(_BY_CHANCE)
    os._exit(0)


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """Return the conversations of one to nine turns, with and without a system turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "word " * 40} for n in range(9)]
    for count in (1, 2, 3, 4, 9):
        yield turns[:count]
        yield [{"role": "system", "content": "Be brief."}, *turns[:count]]
