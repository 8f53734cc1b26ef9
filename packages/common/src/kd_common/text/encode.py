"""Conversion of conversations to tokens by a tokenizer's chat template, with the places of the assistant's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_common.text.records import EncodingError
from kd_common.text.rows import REASONING, Message, Row
from kd_common.text.special import BREAK, MARK, broken, check_characters, each_text, special_tokens
from kd_common.text.template import FIXED_DATE, INSTRUCTION_TEMPLATE, check_template

Turns = list[dict[str, Any]]

APART = "Write a row for each answer, with weight 0 on the answers before it"
FRAMES = 32
PROBE: Turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: Token ids, up to the end of the last answer that is learnt.
        answers: Start of every answer that is learnt, the place behind the token that closes it, and its text.
    """

    ids: list[int]
    answers: list[tuple[int, int, str]]


class ChatEncoder:
    """Encoder of conversations as tokens.

    An answer is the text that the template writes behind the prompt, up to the token that closes the turn. It must hold
    the file's text unchanged; templates may cut white space around it. The text is located by marking its end and
    rendering once more. If the template rewrites the last answer, the given text follows the prompt instead. A row in
    which another answer is rewritten raises `EncodingError`.

    If a token would span the start of an answer, the text is cut there, as a generation starts behind the tokens of its
    prompt. Special tokens in the texts of user, tools and system are encoded as text.

    Args:
        tokenizer: Tokenizer, with or without a chat template.
        system: System turn for conversations that have none.
        chat_template: Jinja template that takes the place of the tokenizer's.

    Attributes:
        closing_id: Token that closes an assistant's turn; None if no special one does.

    Raises:
        EncodingError: If the template does not end, or there is neither a template nor an EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, *, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self._given = chat_template
        self._own_template = chat_template is not None or tokenizer.chat_template is not None
        self._name = f"the chat template of {tokenizer.name_or_path}"
        self._add_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        if not self._own_template and tokenizer.eos_token is None:
            raise EncodingError(f"tokenizer {tokenizer.name_or_path} has neither a chat template nor an EOS token")
        try:
            check_template(self._template(), self._apply, tokenizer.name_or_path)
        except ValueError as error:
            raise EncodingError(str(error)) from error
        self._frames: dict[tuple[str, str], None] = {}  # texts that were found before and behind answers
        self._written: set[tuple[str, ...]] = set()  # roles of conversations rendered completely
        self.closing_id = self._find_closing()
        self._ends = [str(tokenizer.convert_ids_to_tokens(number)) for number in self.eos_ids]
        asked, opened = (self._probed(PROBE[:1], prompt=prompt) for prompt in (False, True))
        self._structure, self._foreign, self._numbers = special_tokens(tokenizer, asked, opened, self._ends)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a generation: the template's closing token, and the tokenizer's EOS."""
        ends = (self.closing_id, self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def prompt(self, row: Row) -> list[int]:
        """Return the tokens of a conversation before its last answer, with the generation prompt.

        Raises:
            EncodingError: If the template rejects the conversation or leaves out a part of it.
        """
        row = self._safe(row)
        turns = self._turns(row.messages[:-1] if row.answered else row.messages, row)
        text = self._render(turns, row, prompt=True)
        self._check_written(turns, text, row)
        return self._tokenised(text, self._befores(turns, row), row)[0]

    def encoded(self, row: Row) -> Encoded:
        """Return the tokens of a conversation up to its last answer that is learnt, and where its answers stand.

        Raises:
            EncodingError: If there is no answer to learn, or the template cannot be used; the row is named.
        """
        learnt = [place for place, message in enumerate(row.messages) if message.role == "assistant" and message.learnt]
        if not learnt:
            raise EncodingError(
                f"{row.source}: no assistant turn to learn from. Give answers, or set responses to teacher to have "
                "them written"
            )
        row = self._safe(row)
        turns = self._turns(row.messages[: learnt[-1] + 1], row)
        added = len(turns) - learnt[-1] - 1  # a system turn that the conversation lacks
        places = [place + added for place in learnt]
        befores = self._befores(turns, row)
        text = self._text(turns, places, befores, row)
        self._check_written(turns[:-1], text, row)
        ids, starts = self._tokenised(text, befores, row)
        spans = [(starts[place], self._end(ids, starts[place], row)) for place in places]
        return Encoded(ids, [(*span, row.messages[place].content) for span, place in zip(spans, learnt, strict=True)])

    def check_learnable(self) -> None:
        """Raise for a template whose answers cannot be learnt from.

        Raises:
            EncodingError: If the template closes an assistant's turn with no special token, so that a student could not
                learn to stop, or does not open the turn in a prompt, so that its opening would be learnt.
        """
        answered = self._render(PROBE, self._probe, prompt=False)
        if self.closing_id is None:
            raise EncodingError(
                f"{self._name}: no special token closes an assistant's turn, so a student could not learn to stop. Set "
                "the tokenizer's chat_template to one that appends the EOS token"
            )
        asked, before = (self._render(PROBE[:1], self._probe, prompt=prompt) for prompt in (False, True))
        self._located(answered, PROBE, 1, before, self._probe)
        if asked == before and any(lead.strip() for lead, _ in self._frames):
            raise EncodingError(
                f"{self._name} does not open an answer where add_generation_prompt asks for it, so a model would have "
                "to write its own role. Set the tokenizer's chat_template to one that does"
            )

    # --- the conversation as text ---

    def _befores(self, turns: Turns, row: Row) -> dict[int, str]:
        """Return the prompt of every answer to a user, by the answer's place."""
        first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and place > first]
        return {place: self._render(turns[:place], row, prompt=True) for place in places}

    def _text(self, turns: Turns, learnt: Sequence[int], befores: Mapping[int, str], row: Row) -> str:
        """Return a conversation that ends with its last learnt answer, with all learnt answers exactly as given."""
        rendered = self._render(turns, row, prompt=False)
        last = learnt[-1]
        end = self._located(rendered, turns, last, befores[last], row)
        text = self._composed(turns, befores[last], row) if end is None else rendered[:end]
        self._check_more(turns, last, text[len(befores[last]) :], row)
        for place in learnt[:-1]:
            end = self._located(rendered, turns, place, befores[place], row)
            if end is None or not text.startswith(rendered[:end]):
                raise EncodingError(
                    f"{row.source}: {self._name} rewrites turn {place + 1}, or what comes before it, once another turn "
                    f"follows, so that answer cannot be learnt there. {APART}"
                )
            self._check_more(turns, place, rendered[len(befores[place]) : end], row)
        return text

    def _located(self, text: str, turns: Turns, place: int, before: str, row: Row) -> int | None:
        """Return the end of an answer and its closing text in a rendering; None if it is not there as given."""
        content = turns[place]["content"]
        forms = dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip()))
        if not text.startswith(before):
            return None
        for lead, close in self._frames:
            for form in forms:
                if text.startswith(lead + form + close, len(before)):
                    return len(before) + len(lead + form + close)
        if not content.strip():  # calls alone
            return len(before) + self._closed(text[len(before) :], place, row, calls=True)
        head, found, tail = self._render(_with(turns, place, content + MARK), row, prompt=False).partition(MARK)
        stop = len(text) - len(tail)
        if not found or MARK in tail or not text.endswith(tail) or text[:stop] not in (head, head.rstrip()):
            return None
        calls = "tool_calls" in turns[place]
        close = tail[: self._closed(tail, place, row, calls=calls)]
        starts = [stop - len(form) for form in forms if text.endswith(form, 0, stop)]
        if behind := [start for start in starts if start >= len(before)]:
            if not turns[place].keys() - {"role", "content"} and len(self._frames) < FRAMES:
                self._frames[text[len(before) : behind[0]], close] = None
        # The prompt may open the answer, as a prompt that ends with <think> does.
        elif not starts or max(starts) < len(self._render(turns[:place], row, prompt=False)) or stop < len(before):
            return None
        return stop + len(close)

    def _composed(self, turns: Turns, before: str, row: Row) -> str:
        """Return a conversation whose rewritten last answer is replaced by the given one."""
        place, content = len(turns) - 1, turns[-1]["content"]
        head, found, tail = self._render(_with(turns, place, MARK), row, prompt=False).partition(MARK)
        if not found or MARK in tail or turns[place].keys() - {"role", "content"}:
            raise EncodingError(f"{row.source}: {self._name} does not write turn {place + 1} as it is given")
        if not before.startswith(head):
            raise EncodingError(
                f"{row.source}: {self._name} renders what comes before turn {place + 1} differently on its own than "
                "within the conversation, so the tokens of that turn are not known. Set the tokenizer's chat_template "
                "to one that only appends"
            )
        if not content.startswith(opening := before[len(head) :]):
            raise EncodingError(
                f"{row.source}: {self._name} lets a generation go on behind {opening!r}, with which turn {place + 1} "
                "does not start: write it into the answer, or set the tokenizer's chat_template to one without it"
            )
        return head + content + tail[: self._closed(tail, place, row, calls=False)]

    def _closed(self, tail: str, place: int, row: Row, *, calls: bool) -> int:
        """Return the place behind the token that closes an answer, in the text after it; calls may stand before it."""
        found = [(tail.index(end), len(end)) for end in self._ends if end in tail]
        if not found or (tail[: min(found)[0]].strip() and not calls):
            raise EncodingError(
                f"{row.source}: {self._name} does not close this answer with {' or '.join(self._ends)} (turn "
                f"{place + 1}), where a generation would end. {APART}, or set the tokenizer's chat_template to another"
            )
        return sum(min(found))

    def _check_written(self, turns: Turns, text: str, row: Row) -> None:
        """Raise for a rendering that lacks text of the user, a tool or the system, or other content of the row."""
        roles = (*(turn["role"] for turn in turns), *row.more)
        known = roles in self._written  # else a short text may occur there by chance
        for place, turn in enumerate(turns):
            shown = turn["role"] == "assistant" or (known and turn["content"].strip() in text)
            if not (shown or MARK in self._render(_with(turns, place, turn["content"] + MARK), row, prompt=True)):
                raise EncodingError(
                    f"{row.source}: {self._name} leaves out turn {place + 1}, the {turn['role']}'s. Write it into "
                    "another turn, or set the tokenizer's chat_template to one that takes it"
                )
            for call in turn.get("tool_calls", ()):
                if call.get("function", call)["name"] not in text:
                    raise EncodingError(f"{row.source}: {self._name} leaves out the tool_calls of turn {place + 1}")
        self._written.add(roles)
        for key in row.more:
            without = {other: value for other, value in row.more.items() if other != key}
            if self._rendered(turns, row, without, prompt=True) == self._rendered(turns, row, row.more, prompt=True):
                raise EncodingError(
                    f"{row.source}: {self._name} leaves out the row's {key}; remove them, or set another"
                )

    def _check_more(self, turns: Turns, place: int, answer: str, row: Row) -> None:
        """Raise for an answer whose reasoning or calls the template leaves out."""
        turn = turns[place]
        calls = turn.get("tool_calls", [])
        names = [call.get("function", call)["name"] for call in calls]
        parts = {key: [turn[key]] for key in REASONING if key in turn} | {"tool_calls": names}
        for key, texts in parts.items():
            if not all(text.strip() in answer for text in texts):
                raise EncodingError(
                    f"{row.source}: {self._name} leaves out the {key} of turn {place + 1}. Write it into the content, "
                    "remove it, or set the tokenizer's chat_template to one that writes it"
                )
        bare = {**turn, "tool_calls": [_without_arguments(call) for call in calls]} if calls else turn
        unthought = {key: value for key, value in turn.items() if key not in REASONING}
        for what, other in (("arguments of the tool_calls", bare), ("reasoning", unthought)):
            changed = [*turns[:place], other, *turns[place + 1 :]]
            if other != turn and answer in self._render(changed, row, prompt=False):
                raise EncodingError(f"{row.source}: {self._name} leaves out the {what} of turn {place + 1}")

    def _render(self, turns: Turns, row: Row, *, prompt: bool) -> str:
        return self._rendered(turns, row, row.more, prompt=prompt)

    def _rendered(self, turns: Turns, row: Row, more: Mapping[str, Any], *, prompt: bool) -> str:
        try:
            return self._apply(turns, prompt=prompt, more=more)
        except Exception as error:  # a template may fail in any way
            raise EncodingError(
                f"{row.source}: {self._name} refuses this conversation: {error or type(error).__name__}"
            ) from error

    def _apply(self, turns: Turns, *, prompt: bool, more: Mapping[str, Any] | None = None) -> str:
        text = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self._template((more or {}).get("tools")),
            add_generation_prompt=prompt,
            tokenize=False,
            add_bos=self._add_bos,
            **(more or {}),
        )
        return str(text)

    def _template(self, tools: Any = None) -> str:
        if not self._own_template:
            return FIXED_DATE + INSTRUCTION_TEMPLATE
        return FIXED_DATE + str(self._given or self.tokenizer.get_chat_template(tools=tools))

    def _turns(self, messages: Sequence[Message], row: Row) -> Turns:
        turns = [self._turn(message, number, row) for number, message in enumerate(messages, 1)]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, self._turn(Message("system", self.system), 0, row))
        return turns

    def _turn(self, message: Message, number: int, row: Row) -> dict[str, Any]:
        texts = {"content": message.content, "input": message.input}
        if self._own_template:
            joined = "\n\n".join(filter(None, texts.values()))
            texts = {"content": joined}
        safe = self._safe_answer if message.role == "assistant" else self._safe_text
        change = partial(safe, place=f"{row.source}: turn {number}")
        return {"role": message.role, **each_text({**texts, **message.more}, change)}

    def _safe(self, row: Row) -> Row:
        """Return the row with everything in addition to its turns as `_safe_text`."""
        return replace(row, more=each_text(row.more, partial(self._safe_text, place=f"{row.source}: the row")))

    def _safe_answer(self, text: str, place: str) -> str:
        """Return a text of the assistant, which may not hold the tokens that structure a conversation."""
        check_characters(text, place)
        if found := self._structure.search(text):
            what = "the token that closes turns" if found[0] in self._ends else "a token that structures turns"
            raise EncodingError(f"{place} contains {found[0]}, {what}; remove it")
        return text

    def _safe_text(self, text: str, place: str) -> str:
        """Return a text of somebody else, in which special tokens are broken."""
        check_characters(text, place)
        return broken(text, self._foreign)

    # --- from text to tokens ---

    def _tokenised(self, text: str, befores: Mapping[int, str], row: Row) -> tuple[list[int], dict[int, int]]:
        """Return the tokens of a rendering, and the number of them before each answer."""
        head: list[int] = []
        starts, cut, rest = {}, 0, self._tokens(text)
        for place, before in befores.items():
            if not text.startswith(before):
                continue
            leading = self._tokens(text[cut : len(before)], inside=cut > 0)
            starts[place] = len(head) + len(leading)
            if rest[: len(leading)] != leading:
                head, cut = head + leading, len(before)
                rest = self._tokens(text[cut:], inside=True)
        ids = head + rest
        written = sum(token in self._numbers.values() for token in self._foreign.findall(text))
        if sum(number in self._numbers for number in ids) != written:  # for example by lower-casing
            raise EncodingError(f"{row.source}: the tokenizer makes other special tokens of a text than stand in it")
        return ids, starts

    def _tokens(self, text: str, *, inside: bool = False) -> list[int]:
        """Return the tokens of a text.

        A broken special token is passed in two parts, so that the tokenizer does not see it.
        """
        first, *others = text.split(BREAK)
        ids = self._inside(first) if inside else self._ids(first)
        for part in others:
            ids += self._inside(part)
        return ids

    def _inside(self, text: str) -> list[int]:
        """Return the tokens of a text within another: some tokenizers put a blank before the first word of a text."""
        line_end = self._ids("\n")
        ids = self._ids("\n" + text)
        return ids[len(line_end) :] if ids[: len(line_end)] == line_end else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _end(self, ids: list[int], start: int, row: Row) -> int:
        """Return the place behind the token that closes the answer which starts at some place."""
        end = next(place for place in range(start, len(ids)) if ids[place] in self.eos_ids) + 1
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids[start : end - 1]:
            raise EncodingError(f"{row.source}: an answer holds characters that the tokenizer has no token for")
        return end

    # --- reading what a template writes ---

    def _find_closing(self) -> int | None:
        _, found, tail = self._probed(PROBE, prompt=False).rpartition(PROBE[1]["content"])
        added = self.tokenizer.added_tokens_decoder.items()  # Gemma also adds white space
        special = {self.tokenizer.eos_token_id, *(number for number, token in added if token.content.strip())}
        return next((token for token in self._ids(tail if found else "") if token in special), None)

    def _probed(self, turns: Turns, *, prompt: bool) -> str:
        """Return a short conversation as text; empty for a template that wants other turns."""
        try:
            return self._render(turns, self._probe, prompt=prompt)
        except EncodingError:
            return ""

    @property
    def _probe(self) -> Row:
        return Row((), self._name)


def _with(turns: Turns, place: int, content: str) -> Turns:
    return [*turns[:place], {**turns[place], "content": content}, *turns[place + 1 :]]


def _without_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {**call.get("function", call), "arguments": {}}
    return {**call, "function": function} if "function" in call else function
