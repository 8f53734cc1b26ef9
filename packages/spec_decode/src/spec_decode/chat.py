"""`python -m spec_decode.chat`: talk to a model in the terminal.

`/new` starts over, `/exit` ends, Ctrl-C stops an answer.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.chat")  # before the imports below, which take seconds

import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from jsonargparse import auto_cli

from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser
from spec_decode.decoding.session import Session, check_settings
from spec_decode.generate import answer

COMMANDS = {"/new": "starts over", "/exit": "ends"}


def talk(
    session: Session,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    color: bool,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> list[dict[str, str]]:
    """Read and answer until the user leaves; return the conversation.

    A turn that no longer fits the context is refused, and what was said before is kept. Ctrl-C stops an answer, of
    which what was written is kept.
    """
    out, messages = out or sys.stdout, list[dict[str, str]]()
    while True:
        try:
            text = read("> ").strip()
        except EOFError:
            return messages
        if text == "/exit":
            return messages
        if text == "/new":
            messages = []
        elif unknown := re.match(r"/\w*(?!\S)", text):
            out.write(f"No such command: {unknown[0]} ({help_text()})\n")
        elif text:
            messages = reply(
                session,
                [*messages, {"role": "user", "content": text}],
                out,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                color=color,
            )


def help_text() -> str:
    """Return the commands with a line about each."""
    return ", ".join(f"{name} {effect}" for name, effect in COMMANDS.items())


def reply(session: Session, asked: list[dict[str, str]], out: TextIO, **settings: Any) -> list[dict[str, str]]:
    """Answer the last turn; returns the conversation with the answer, without that turn if there is none.

    Args:
        session: Target, drafter and tokenizer.
        asked: The conversation, ending with the user's turn.
        out: Where to write.
        **settings: Of `answer`.
    """
    if len(session.encode(asked)) >= session.target.context:
        out.write(f"That exceeds the context of {session.target.context} tokens; start over with /new\n")
        return asked[:-1]
    text, result = answer(session, asked, top_k=0, out=out, stoppable=True, **settings)
    if result is not None:
        out.write(f"[{session.summary(result)}]\n")
    else:
        out.write("[stopped]\n" if text else "[stopped before the first word: this turn is left out]\n")
    return [*asked, {"role": "assistant", "content": text}] if text or result is not None else asked[:-1]


def chat(
    drafter: str = "PromptLookup",
    target: str | None = None,
    tree: str = "chain",
    min_confidence: float = 0.0,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    color: bool | None = None,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Talk to a model.

    Args:
        drafter: Folder of a trained drafter, `PromptLookup`, or `none` for plain decoding.
        target: Target by folder or name; by default the one the drafter was trained for, else the embedded SmolLM2.
        tree: `auto` (measured), `chain`, candidates per level such as `4,2,1`, or `dynamic:DEPTH,TOP_K,NODES`.
        min_confidence: Draft only what the drafter takes to be reached with this probability, in [0, 1).
        max_new_tokens: Longest answer in tokens.
        temperature: 0 is greedy.
        top_p: Keep the likeliest tokens of this total probability.
        seed: Seed of the draws.
        color: Show drafted and accepted tokens in green; by default where the output is a terminal.
        compile: Compile the target's passes; the first one of every size then takes seconds to minutes.
        dtype: Precision of the target's weights; `auto` is the one this machine is fastest in.
        device: Where to run.
    """
    top_p = top_p if temperature else 1.0  # greedily there is nothing to cut
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    session = Session.open(
        drafter, target, dtype=dtype, device=device, tree=tree, min_confidence=min_confidence, compile=compile
    )
    colored = sys.stdout.isatty() if color is None else color
    legend = " Green: drafted, and accepted by the target." if colored else ""
    print(f"{help_text()}, Ctrl-C stops an answer.{legend}")
    talk(
        session,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        color=colored,
    )


if __name__ == "__main__":
    run_command(lambda: auto_cli(chat, as_positional=False, parser_class=CommandParser))
