"""Conversations to tokens through the tokenizer's chat template, with a loss on the assistant's tokens alone."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llm_kd.data.example import Example
from llm_kd.data.rows import Message, Row

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
"""Layout for tokenizers without a chat template, such as GPT-2's; the headings are Alpaca's. A system turn comes first
as it is."""

TODAY = "01 Jan 2025"
"""The date in every prompt whose template prints today's: else all sequences and cache keys would change overnight."""

_FIXED_DATE = "{% macro strftime_now(format) %}" + TODAY + "{% endmacro %}"


class EncodingError(ValueError):
    """A row or a template that cannot be turned into tokens with a loss; the message names the row."""


class Encoder:
    """Tokens of conversations.

    The assistant's turns are found by rendering the conversation up to each of them, which must be the beginning of the
    whole. Where a token would span the place at which an answer starts, the text is cut there: a generation starts
    behind the tokens of its prompt. A turn ends with the token by which the template closes it.

    Args:
        tokenizer: Tokenizer, with or without a chat template.
        system: System turn for conversations that have none.

    Attributes:
        closing_id: Token that closes an assistant's turn.

    Raises:
        EncodingError: If the template closes an assistant's turn with no special token, so that a student could not
            learn to stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self._own_template = tokenizer.chat_template is not None
        template = tokenizer.get_chat_template() if self._own_template else INSTRUCTION_TEMPLATE
        self._template = _FIXED_DATE + template
        self._add_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        if not self._own_template and tokenizer.eos_token is None:
            raise EncodingError(f"tokenizer {tokenizer.name_or_path} has neither a chat template nor an EOS token")
        self.closing_id = self._find_closing()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens at which a generation ends: the template's closing token, and the tokenizer's EOS if it is another."""
        eos = self.tokenizer.eos_token_id
        return (self.closing_id,) if eos in (None, self.closing_id) else (self.closing_id, eos)

    def prompt(self, row: Row) -> list[int]:
        """Tokens of a conversation before its last answer, with the generation prompt.

        Raises:
            EncodingError: If the template refuses the conversation.
        """
        messages = row.messages[:-1] if row.answered else row.messages
        return self._encode(messages, row.source, prompt=True)[0]

    def example(self, row: Row, max_length: int, truncate: bool = False) -> Example | None:
        """A conversation with a loss on every assistant turn; what follows the last one is left out.

        Args:
            row: Conversation with at least one assistant turn.
            max_length: Largest number of tokens.
            truncate: Cut a longer conversation at this length; an answer that is cut has no closing token.

        Returns:
            None if the conversation is too long, or, with ``truncate``, if no assistant turn starts below the limit.

        Raises:
            EncodingError: If there is no assistant turn, or the template cannot be used; the row is named.
        """
        answers = [message.content for message in row.messages if message.role == "assistant"]
        if not answers:
            raise EncodingError(
                f"{row.source}: no assistant turn to learn from. Give answers, or set responses to teacher to have "
                "them written"
            )
        ids, starts = self._encode(row.messages, row.source, prompt=False)
        turns = [(start, self._end(ids, start, row), answer) for start, answer in zip(starts, answers, strict=True)]
        if truncate:
            turns = [turn for turn in turns if turn[0] < max_length]
        if not turns or (turns[-1][1] > max_length and not truncate):
            return None
        last_start, last_end, reference = turns[-1]
        length = min(last_end, max_length)
        mask = [False] * length
        for start, end, _ in turns:
            mask[start:end] = [True] * (min(end, length) - start)
        return Example(ids[:length], mask, last_start, reference)

    def _encode(self, messages: Sequence[Message], source: str, *, prompt: bool) -> tuple[list[int], list[int]]:
        """Tokens of a conversation, and the number of them before each assistant turn."""
        text = self._render(messages, source, prompt=prompt)
        head: list[int] = []
        starts, cut, rest = [], 0, self._tokens(text)
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:place], source, prompt=True)
            if not text.startswith(before):
                raise EncodingError(
                    f"{source}: the chat template of {self.tokenizer.name_or_path} renders what comes before turn "
                    f"{place + 1} differently on its own than within the conversation, so the tokens of that turn are "
                    "not known. Set the tokenizer's chat_template to one that only appends"
                )
            leading = self._tokens(text[cut : len(before)])
            starts.append(len(head) + len(leading))
            if rest[: len(leading)] != leading:
                head, cut, rest = head + leading, len(before), self._tokens(text[len(before) :])
        return head + rest, starts

    def _end(self, ids: list[int], start: int, row: Row) -> int:
        """Place behind the token that closes the assistant's turn which starts at some place."""
        closing = str(self.tokenizer.convert_ids_to_tokens(self.closing_id))
        if any(closing in message.content for message in row.messages):
            raise EncodingError(f"{row.source}: a turn contains {closing}, the token that closes turns")
        try:
            return ids.index(self.closing_id, start) + 1
        except ValueError:
            raise EncodingError(
                f"{row.source}: the chat template of {self.tokenizer.name_or_path} does not close this answer with "
                f"{closing}"
            ) from None

    def _find_closing(self) -> int:
        answer = "answer"
        probe = (Message("user", "question"), Message("assistant", answer))
        where = f"chat template of {self.tokenizer.name_or_path}"
        tail = self._tokens(self._render(probe, where, prompt=False).rpartition(answer)[2])
        added = self.tokenizer.added_tokens_decoder.items()  # Gemma adds white space, too
        special = {self.tokenizer.eos_token_id, *(number for number, token in added if token.content.strip())}
        closing = next((token for token in tail if token in special), None)
        if closing is None:
            raise EncodingError(
                f"{where}: no special token closes an assistant's turn, so a student could not learn to stop. Set the "
                "tokenizer's chat_template to one that appends the EOS token"
            )
        return closing

    def _render(self, messages: Sequence[Message], source: str, *, prompt: bool) -> str:
        turns = [self._turn(message) for message in messages]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                add_generation_prompt=prompt,
                tokenize=False,
                add_bos=self._add_bos,
            )
        except TemplateError as error:
            raise EncodingError(f"{source}: the chat template refuses this conversation: {error}") from error
        return str(text)

    def _turn(self, message: Message) -> dict[str, str]:
        if not self._own_template:
            return {"role": message.role, "content": message.content, "input": message.input}
        content = f"{message.content}\n\n{message.input}" if message.input else message.content
        return {"role": message.role, "content": content}

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def padding_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Token that fills up rows: the tokenizer's, or the first of those that end a response if it has none."""
    pad = tokenizer.pad_token_id
    return ends[0] if pad is None else pad
