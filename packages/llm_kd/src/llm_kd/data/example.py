"""One tokenised sequence with the tokens that carry a loss."""

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Example:
    """A conversation as tokens.

    Attributes:
        input_ids: Token ids.
        loss_mask: True where the token is an assistant's: the content of each of its turns and the token that closes
            it. The first token has none before it to predict it, so it is never one.
        prompt_length: Number of tokens up to and including the generation prompt of the last assistant turn.
        reference: Text of the answer that generations are compared with.
        key: Hash of tokens and mask, the name of the sequence in caches.

    Raises:
        ValueError: If mask and tokens do not fit each other.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    reference: str = ""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.loss_mask) or self.loss_mask[0]:
            raise ValueError(
                "an example needs at least one token, a loss mask of the same length, and no loss on the first token; "
                f"got {len(self.input_ids)} tokens and a mask of {len(self.loss_mask)}"
            )
        content = np.asarray(self.input_ids, "<i8").tobytes() + np.asarray(self.loss_mask, np.bool_).tobytes()
        object.__setattr__(self, "key", hashlib.sha256(content).hexdigest())

    @property
    def num_supervised(self) -> int:
        """Return the number of tokens that carry a loss."""
        return sum(self.loss_mask)


def prompt_response_example(prompt: list[int], response: list[int], reference: str) -> Example:
    """Return the example of a prompt and the tokens that a model answered with.

    The tokens are used as they were generated: text that is tokenised again may come out differently, and an answer
    that ran into the length limit must not be closed by an end-of-turn token that its author never wrote.
    """
    mask = [False] * len(prompt) + [True] * len(response)
    return Example(prompt + response, mask, len(prompt), reference)


def padding_example(pad_id: int) -> Example:
    """Return one token of padding, neither prompt nor answer, for a process that has no rows left."""
    return Example([pad_id], [False], prompt_length=0)
