"""How a language model draws the tokens of an answer."""

from dataclasses import dataclass

from kd_common.checks import at_least, within
from kd_common.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are drawn: the logits are divided by the temperature, then top-k and top-p cut them.

    Args:
        temperature: Temperature of the distribution drawn from; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens; 0 for all.
        top_p: Draw from the most likely tokens that hold this share of the probability, in (0, 1]; 1 for all.
        max_new_tokens: Largest number of tokens of an answer.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and answer; 0 allows it.

    Raises:
        UserError: If a setting is out of its range, or without effect.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        at_least("temperature", self.temperature, 0)
        within("top_p", self.top_p, "(0, 1]")
        for name, least in {"top_k": 0, "max_new_tokens": 1, "no_repeat_ngram_size": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"{name} must be a whole number >= {least}, got {value}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise UserError("temperature 0 takes the most likely token, so top_p and top_k do nothing: raise it")
