"""Text that the target itself wrote, on the step runner, or that a file holds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kd_common.errors import UserError
from kd_common.text import AnswerCache, ChatEncoder, EncodingError, Message, Row, encode_each
from spec_decode.data.prompts import Answer
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.sampling import Sampling
from spec_decode.models import CausalLM

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A prompt and the target's answer.

    Attributes:
        tokens: Token ids of both.
        answer_start: Index of the answer's first token.
    """

    tokens: list[int]
    answer_start: int


def corpus(
    folder: Path,
    target: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: Sequence[int],
    seed: int,
    batch_size: int,
) -> AnswerCache:
    """Return the target's answers as these settings determine them."""
    weights = (target.fingerprint(target.dtype), str(target.dtype))
    drawn = {"sampling": asdict(sampling), "stops": [*stops], "seed": seed, "batch_size": batch_size}
    return AnswerCache(folder, "text", {"weights": weights} | drawn, prompts, batch_size)


def write_corpus(
    cache: AnswerCache,
    target: CausalLM,
    sampling: Sampling,
    *,
    stops: Sequence[int],
    seed: int,
    progress: bool = True,
) -> list[Sample]:
    """Let the target answer the prompts that are not answered yet; returns all samples, in the order of the prompts.

    Args:
        cache: What `corpus` returned for these settings.
        target: Target, on the device to generate on.
        sampling: How tokens are drawn.
        stops: Tokens that end an answer.
        seed: Seed of the draws.
        progress: Whether to show a progress bar.

    Raises:
        UserError: If a line is damaged.
        OSError: If it cannot be written; what is complete stays and is continued.
    """
    decoder = SpeculativeDecoder(target)

    def write_batch(asked: list[list[int]], start: int) -> list[list[int]]:
        return decoder.generate(
            asked,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed + start,
            stop_tokens=stops,
        ).new_tokens

    return as_samples(cache.prompts, cache.write(write_batch, "the target's text", progress=progress))


def as_samples(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Sample]:
    """Prompts with their answers behind them."""
    return [Sample([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | Row], *, longest: int, chat_template: str | None = None
) -> list[list[int]]:
    """Prompts as conversations in the model's chat template; see `kd_common.text.ChatEncoder`.

    Args:
        tokenizer: transformers tokenizer.
        prompts: Conversations, or texts of users.
        longest: Prompts of more tokens are left out.
        chat_template: Jinja template for a model that comes without one.

    Raises:
        ValueError: If no prompt is left, or the template fails; rows are counted.
    """
    encoder = ChatEncoder(tokenizer, chat_template=chat_template)
    encoded = encode_each(prompt_rows(prompts), encoder.prompt)
    return _not_empty([ids for ids in encoded if len(ids) <= longest], longest)


def encode_answers(
    tokenizer: Any,
    prompts: Sequence[str | Row],
    answers: Sequence[str | Answer],
    *,
    longest: int,
    max_length: int,
    chat_template: str | None = None,
) -> list[Sample]:
    """Prompts as in `encode_prompts` with given answers behind them.

    Where the file holds the tokens of an answer, these are taken. A text is tokenised anew, which need not give the
    tokens that the target wrote, and closed as the template closes it unless its length limit cut it.

    Args:
        tokenizer: transformers tokenizer.
        prompts: Conversations, or texts of users.
        answers: The target's answer to each.
        longest: Prompts of more tokens are left out.
        max_length: Where a sequence is cut, > `longest`.
        chat_template: Jinja template for a model that comes without one.

    Raises:
        ValueError: If no prompt is left, the template fails, or tokens are not those of the text beside them.
    """
    encoder = ChatEncoder(tokenizer, chat_template=chat_template)
    rows = prompt_rows(prompts)
    given = [Answer(Message("assistant", answer)) if isinstance(answer, str) else answer for answer in answers]
    samples = encode_each(list(zip(rows, given, strict=True)), lambda pair: _answered(encoder, *pair))
    fitting = [sample for sample in samples if sample.answer_start <= longest]
    return _not_empty([Sample(s.tokens[:max_length], s.answer_start) for s in fitting], longest)


def _answered(encoder: ChatEncoder, row: Row, answer: Answer) -> Sample:
    """Return a prompt with its answer behind it."""
    if answer.tokens is not None:
        _check_tokens(encoder.tokenizer, row, answer)
        prompt = encoder.prompt(row)
        return Sample([*prompt, *answer.tokens], len(prompt))
    encoded = encoder.encoded(replace(row, messages=(*row.messages, answer.message)))
    start, end, _ = encoded.answers[-1]
    return Sample(encoded.ids[: end - answer.cut], start)


def _check_tokens(tokenizer: Any, row: Row, answer: Answer) -> None:
    """Refuse tokens of an answer that are none of the tokenizer's, or another's."""
    tokens, text = list(answer.tokens or ()), answer.message.content.strip()
    if not all(0 <= token < len(tokenizer) for token in tokens):
        raise EncodingError(f"{row.source}: output_token_ids must lie in [0, {len(tokenizer)}), the target's tokens")
    written = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    if text and "".join(written.split()) != "".join(text.split()):
        raise EncodingError(
            f"{row.source}: output_token_ids read {written!r:.60} with the target's tokenizer, the answer beside them "
            f"{text!r:.60}; give the target that wrote them, or remove the ids"
        )


def prompt_rows(prompts: Sequence[str | Row]) -> list[Row]:
    """Prompts as conversations."""
    return [
        Row((Message("user", prompt),), f"prompt {number}") if isinstance(prompt, str) else prompt
        for number, prompt in enumerate(prompts, 1)
    ]


def _not_empty(found: list[T], longest: int) -> list[T]:
    if not found:
        raise UserError(f"no prompt has 1 to {longest} tokens; allow longer ones or shorten the prompts")
    return found
