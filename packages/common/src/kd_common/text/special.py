"""Special tokens that occur in texts and are text there, although a tokenizer would take them for its own."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_common.text.records import EncodingError, broken_text

# Two of Unicode's noncharacters, which occur in no text. One breaks special tokens in a text, one marks a text's end.
BREAK, MARK = "\ufdd0", "\ufdd1"


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, asked: str, opened: str, ends: Collection[str]
) -> tuple[re.Pattern[str], re.Pattern[str], dict[int, str]]:
    """Return the tokens forbidden in answers, the tokens treated as text elsewhere, and the ids of the latter.

    The first group structures a conversation. An answer may hold others, such as the marks of thoughts and calls,
    because the model itself writes them there. In all other texts special tokens are plain text.

    Args:
        tokenizer: The tokenizer.
        asked: A user's turn in the chat template.
        opened: The same turn with the beginning of an answer.
        ends: Tokens that end answers.
    """
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    structure = {*filter(None, named), *ends, *(token.content for token in tokens if token.content in asked)}
    foreign = structure | {token.content for token in tokens if token.special or token.content in opened}
    # The id of the unknown token encodes other texts, too.
    counted = {token for token in foreign if len(token) > 1 and token != tokenizer.unk_token}
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    return _pattern(structure), _pattern(foreign), {n: token for n, token in added.items() if token in counted}


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return the nested objects and lists with each text in them changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {each_text(key, change): each_text(inner, change) for key, inner in value.items()}
    return [each_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def check_characters(text: str, place: str) -> None:
    """Raise for half a surrogate pair, and for the two noncharacters that are reserved as marks.

    Raises:
        EncodingError: Naming the place of the text.
    """
    if problem := broken_text(text):
        raise EncodingError(f"{place} {problem}")
    if BREAK in text or MARK in text:
        raise EncodingError(f"{place} contains U+FDD0 or U+FDD1, which are no characters")


def _pattern(tokens: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def broken(text: str, tokens: re.Pattern[str]) -> str:
    """Return a text in which all of some tokens are broken behind their first character."""
    while tokens.search(text):
        text = tokens.sub(lambda found: found[0][:1] + BREAK + found[0][1:], text)
    return text
