"""`python -m spec_decode.generate --prompt ...`: answer one prompt, streaming.

Drafted tokens that the target accepted are green where colours are shown.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.generate")  # before the imports below, which take seconds

import sys
from collections.abc import Sequence
from typing import TextIO

from jsonargparse import auto_cli

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser
from kd_common.terminal import printable
from spec_decode.decoding.session import Session, TextStream, check_settings
from spec_decode.decoding.statistics import Generation

GREEN, RESET = "\033[32m", "\033[0m"


def answer(
    session: Session,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_strings: Sequence[str] = (),
    color: bool = False,
    out: TextIO | None = None,
    stoppable: bool = False,
) -> tuple[str, Generation | None]:
    """Stream the answer to a conversation, its control characters spelled out.

    Args:
        session: Target, drafter and tokenizer.
        messages: The conversation.
        max_new_tokens: Longest answer in tokens.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        seed: Seed of the draws.
        stop_strings: Texts that end the answer.
        color: Show drafted and accepted tokens in green.
        out: Where to write; standard output by default.
        stoppable: Whether Ctrl-C ends the answer instead of the program.

    Returns:
        The text as far as it was written, and what the decoder reports; None for an answer that was stopped.
    """
    out = out or sys.stdout
    stream, pieces = TextStream(session.tokenizer), list[str]()

    def show(text: str, *, drafted: bool) -> None:
        if text:
            pieces.append(text)
            out.write(f"{GREEN}{printable(text)}{RESET}" if color and drafted else printable(text))

    def on_tokens(row: int, tokens: list[int], drafted: list[bool]) -> None:
        for token, from_draft in zip(tokens, drafted, strict=True):
            show(stream.push(token), drafted=from_draft)
        out.flush()

    result = None
    try:
        result = session.decoder.generate(
            [session.encode(messages)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=session.stops,
            stop_strings=stop_strings,
            on_tokens=on_tokens,
        )
    except KeyboardInterrupt:
        if not stoppable:
            raise
    show(stream.rest(), drafted=False)
    out.write("\n")
    return "".join(pieces), result


def generate(
    prompt: str,
    drafter: str = "PromptLookup",
    target: str | None = None,
    tree: str = "chain",
    min_confidence: float = 0.0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_strings: list[str] | None = None,
    rejection: bool = False,
    color: bool = False,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
) -> Generation:
    """Answer a prompt.

    Args:
        prompt: What to answer.
        drafter: Folder of a trained drafter, `PromptLookup`, or `none` for plain decoding.
        target: Target by folder or name; by default the one the drafter was trained for, else the embedded SmolLM2.
        tree: `auto` (measured), `chain`, candidates per level such as `4,2,1`, or `dynamic:DEPTH,TOP_K,NODES`.
        min_confidence: Draft only what the drafter takes to be reached with this probability, in [0, 1).
        max_new_tokens: Longest answer in tokens.
        temperature: 0 is greedy.
        top_k: Keep this many tokens; 0 keeps all.
        top_p: Keep the likeliest tokens of this total probability.
        seed: Seed of the draws.
        stop_strings: Texts that end the answer.
        rejection: Verify drawn candidates by recursive rejection instead of sample-and-match.
        color: Show drafted and accepted tokens in green.
        compile: Compile the target's passes; the first one of every size then takes seconds to minutes.
        dtype: Precision of the target's weights; `auto` is the one this machine is fastest in.
        device: Where to run.
    """
    if not prompt.strip():
        raise UserError("--prompt is empty: say what to answer, or talk to the model with `python -m spec_decode.chat`")
    check_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_strings=stop_strings or (),
    )
    session = Session.open(
        drafter,
        target,
        dtype=dtype,
        device=device,
        tree=tree,
        rejection=rejection,
        min_confidence=min_confidence,
        compile=compile,
    )
    messages = [{"role": "user", "content": prompt}]
    _, result = answer(
        session,
        messages,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_strings=stop_strings or (),
        color=color,
    )
    assert result is not None
    print(session.summary(result))
    return result


if __name__ == "__main__":
    run_command(lambda: auto_cli(generate, as_positional=False, parser_class=CommandParser))
