"""Text that the target itself wrote: generated in batches on the step runner, resumable, cached.

A corpus is a JSONL file with one line per prompt; a line is complete or absent. The longest prompt comes first, so that
the prompts of a batch are about equally long. The file's name is a digest of all that determines the text: changed
settings never meet old text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from kd_common.errors import UserError
from kd_common.files import checksummed_line, complete_lines, naming, read_checksummed_line
from kd_common.text import ChatEncoder, EncodingError, Message, Row, encode_each
from spec_decode.data.prompts import Answer
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.sampling import Sampling
from spec_decode.models import CausalLM

T = TypeVar("T")


@dataclass(frozen=True)
class Writing:
    """How the target writes its text.

    Args:
        max_new_tokens: Longest answer, >= 1.
        temperature: See `Sampling`; 0 is greedy.
        top_p: See `Sampling`.
        batch_size: Prompts answered at once, >= 1.
        seed: Seed of the draws.

    Raises:
        ValueError: If a setting is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(self.temperature, top_p=self.top_p)
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise UserError(f"max_new_tokens and batch_size of data.writing must be >= 1, got {self}")


@dataclass(frozen=True)
class Sample:
    """A prompt and the target's answer.

    Attributes:
        tokens: Token ids of both.
        answer_start: Index of the answer's first token.
    """

    tokens: list[int]
    answer_start: int


def corpus_path(
    folder: Path, target: CausalLM, prompts: Sequence[Sequence[int]], writing: Writing, stops: Sequence[int]
) -> Path:
    """File of the corpus that these settings determine."""
    weights = (target.fingerprint(target.dtype), str(target.dtype))
    content = json.dumps([*weights, list(map(list, prompts)), asdict(writing), [*stops]])
    return folder / f"text-{hashlib.sha256(content.encode()).hexdigest()[:16]}.jsonl"


def _samples(lines: Iterable[bytes], path: Path) -> dict[int, Sample]:
    samples = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = read_checksummed_line(line)
            tokens, start = record["tokens"], record["answer_start"]
            if not isinstance(tokens, list) or not isinstance(start, int):
                raise ValueError(f"tokens {tokens!r:.50}, answer_start {start!r:.50}")
            samples[record["prompt"]] = Sample(tokens, start)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: damaged ({error}); delete it to write the text again") from error
    return samples


def read_corpus(path: Path) -> dict[int, Sample]:
    """Samples by the index of their prompt, in this order.

    Raises:
        ValueError: If a line is damaged.
    """
    return dict(sorted(_samples(complete_lines(path), path).items()))


def write_corpus(
    path: Path,
    target: CausalLM,
    prompts: Sequence[Sequence[int]],
    writing: Writing,
    stops: Sequence[int],
    *,
    progress: bool = True,
) -> list[Sample]:
    """Let the target answer the prompts that have no line yet; returns all samples, in the order of the prompts.

    Args:
        path: File from `corpus_path`.
        target: Target, on the device to generate on.
        prompts: Prompts as token ids.
        writing: How to write.
        stops: Tokens that end an answer.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a line is damaged.
        OSError: If it cannot be written; what is complete stays and is continued.
    """
    lines = complete_lines(path)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    done = _samples(lines, path)
    if list(done) != order[: len(lines)] or any(
        s.tokens[: s.answer_start] != list(prompts[i]) for i, s in done.items()
    ):
        raise UserError(
            f"{path} is damaged: it does not answer the prompts in order; delete it to write the text again"
        )
    if len(lines) == len(prompts):
        return [done[i] for i in range(len(prompts))]
    # Only whole batches are kept: the draws of a batch are numbered from its start.
    lines = lines[: len(lines) // writing.batch_size * writing.batch_size]
    done = {i: done[i] for i in order[: len(lines)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    decoder = SpeculativeDecoder(target)
    bar = tqdm(total=len(prompts), initial=len(done), desc="target writes", unit="answer", disable=not progress)
    advice = "the answers before are complete; start again to go on from there"
    with naming(path, advice), path.open("r+b" if path.exists() else "wb") as file, bar:
        file.truncate(file.seek(sum(map(len, lines))))
        for start in range(len(done), len(prompts), writing.batch_size):
            batch = order[start : start + writing.batch_size]
            out = decoder.generate(
                [prompts[i] for i in batch],
                max_new_tokens=writing.max_new_tokens,
                temperature=writing.temperature,
                top_p=writing.top_p,
                seed=writing.seed + start,
                stop_tokens=stops,
            )
            answers = zip(batch, out.new_tokens, strict=True)
            samples = {i: Sample([*prompts[i], *new], len(prompts[i])) for i, new in answers}
            file.write(b"".join(checksummed_line({"prompt": i, **asdict(s)}) for i, s in samples.items()))
            file.flush()
            done |= samples
            bar.update(len(samples))
    return [done[i] for i in range(len(prompts))]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | Row], *, longest: int, chat_template: str | None = None
) -> list[list[int]]:
    """Prompts as conversations in the model's chat template; see :class:`kd_common.text.ChatEncoder`.

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
    """A prompt with its answer behind it."""
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
