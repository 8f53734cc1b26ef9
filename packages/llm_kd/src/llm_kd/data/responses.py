"""Responses that a teacher writes once."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_common.files import cache_root
from kd_common.hub.language_models import settings_with_effect
from kd_common.sampling import SamplingParams
from kd_common.text import AnswerCache
from llm_kd.models import vocabulary_size
from llm_kd.models.fingerprint import tensors_fingerprint
from llm_kd.models.generation import generate, response_ends


@dataclass(frozen=True)
class Response:
    """What a teacher answered.

    Attributes:
        tokens: Token ids, with the token that ended the response if one did.
        text: The same as text, without special tokens.
    """

    tokens: list[int]
    text: str


def write_responses(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
    pad_id: int,
    seed: int,
    batch_size: int,
    progress_bar: bool = True,
) -> list[Response]:
    """Return a teacher's responses to prompts, from the cache as far as they are there.

    They are kept in `$KD_CACHE/responses` (default `~/.cache/kd/responses`); see
    `kd_common.text.AnswerCache`. What other files answered alike is taken from there, so that the teacher
    answers new prompts only.

    Args:
        model: Teacher, as `llm_kd.models.generation.generate` takes it.
        prompts: Token ids, at least one per prompt.
        sampling: How tokens are drawn.
        tokenizer: Gives the text, and the size of the vocabulary.
        eos_ids: Tokens that end a response.
        pad_id: Token that fills up the prompts of a batch.
        seed: Seed of the drawing.
        batch_size: Prompts per batch. This, and what was answered before, only changes which random numbers a prompt
            gets.
        progress_bar: Show one while writing.

    Returns:
        Responses in the order of the prompts.

    Raises:
        UserError: If the cached file is damaged, or a prompt is empty or too long for the positions of the model.
    """
    vocab_size = vocabulary_size(tokenizer)
    settings = {
        "weights": tensors_fingerprint(model.state_dict()),
        "config": settings_with_effect(model.config.to_dict()),
        "sampling": asdict(sampling),
        "eos_ids": response_ends(model, eos_ids),
        "vocab_size": vocab_size,
        "seed": seed,
    }

    def write_batch(asked: list[list[int]], start: int) -> list[list[int]]:
        drawn = np.random.SeedSequence((seed, start)).generate_state(1).item()
        ends: dict[str, Any] = {"eos_ids": eos_ids, "pad_id": pad_id, "vocab_size": vocab_size}
        return generate(model, asked, sampling, seed=drawn, batch_size=batch_size, **ends)

    name = Path(model.config.name_or_path).name or "model"
    cache = AnswerCache(cache_root() / "responses", name, settings, prompts, batch_size)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    found = cache.write(write_batch, "the teacher's responses", reuse=True, decode=decode, progress=progress_bar)
    return [Response(tokens, decode(tokens)) for tokens in found]
