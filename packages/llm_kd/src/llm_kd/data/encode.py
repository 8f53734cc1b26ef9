"""Conversations to examples with a loss on the assistant's tokens alone."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kd_common.text import ChatEncoder, Row
from llm_kd.data.example import Example


class Encoder(ChatEncoder):
    """Conversations as tokens, and as examples to learn from; see `kd_common.text.ChatEncoder`.

    Args:
        tokenizer: Tokenizer, with or without a chat template.
        system: System turn for conversations that have none.

    Raises:
        EncodingError: If answers in the tokenizer's chat template cannot be learnt from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        super().__init__(tokenizer, system)
        self.check_learnable()

    def example(self, row: Row, max_length: int, truncate: bool = False) -> Example | None:
        """Return a conversation with a loss on every assistant turn; what follows the last one is left out.

        Args:
            row: Conversation with at least one assistant turn.
            max_length: Largest number of tokens.
            truncate: Cut a longer conversation at this length; an answer that is cut has no closing token.

        Returns:
            None if the conversation is too long, or, with `truncate`, if no assistant turn starts below the limit.

        Raises:
            EncodingError: If there is no assistant turn, or the template cannot be used; the row is named.
        """
        encoded = self.encoded(row)
        turns = encoded.answers
        if truncate:
            turns = [turn for turn in turns if turn[0] < max_length]
        if not turns or (turns[-1][1] > max_length and not truncate):
            return None
        last_start, last_end, reference = turns[-1]
        length = min(last_end, max_length)
        mask = [False] * length
        for start, end, _ in turns:
            mask[start:end] = [True] * (min(end, length) - start)
        return Example(encoded.ids[:length], mask, last_start, reference)


def padding_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Token that fills up rows: the tokenizer's, or the first of those that end a response if it has none."""
    pad = tokenizer.pad_token_id
    return ends[0] if pad is None else pad
