"""Text that the target itself wrote: generated in batches on the step runner, resumable, cached.

A corpus is a JSONL file with one line per prompt; a line is complete or absent. The longest prompt comes first, so that
the prompts of a batch are about equally long. The file's name is a digest of all that determines the text: changed
settings never meet old text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from tqdm import tqdm

from kd_common.files import checksummed_line, complete_lines, naming, read_checksummed_line
from spec_decode.decoder import SpeculativeDecoder
from spec_decode.models import CausalLM
from spec_decode.sampling import Sampling

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
            raise ValueError(f"max_new_tokens and batch_size of data.writing must be >= 1, got {self}")


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
            raise ValueError(f"{path}, line {number}: damaged ({error}); delete it to write the text again") from error
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
    # Complete files of an earlier version stand in another order.
    whole = len(lines) == len(prompts)
    fits = sorted(done) == sorted(order) if whole else list(done) == order[: len(lines)]
    if not fits or any(s.tokens[: s.answer_start] != list(prompts[i]) for i, s in done.items()):
        raise ValueError(
            f"{path} is damaged: it does not answer the prompts in order; delete it to write the text again"
        )
    if whole:
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
    tokenizer: Any, prompts: Sequence[str], *, longest: int, chat_template: str | None = None
) -> list[list[int]]:
    """Prompts as the user's turn of the model's chat template; as plain text for a tokenizer without one.

    Args:
        tokenizer: transformers tokenizer.
        prompts: Texts.
        longest: Prompts of more tokens are left out.
        chat_template: Jinja template for a model that comes without one.

    Raises:
        ValueError: If no prompt is left, or the template fails.
    """
    return _not_empty([ids for ids in _turns(tokenizer, prompts, chat_template) if 0 < len(ids) <= longest], longest)


def encode_answers(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    longest: int,
    max_length: int,
    stops: Sequence[int],
    chat_template: str | None = None,
) -> list[Sample]:
    """Prompts as in `encode_prompts` with given answers behind them, ended by the first stop token.

    Args:
        tokenizer: transformers tokenizer.
        prompts: Texts.
        answers: The target's answer to each, as text. Its tokens are those the tokenizer makes of it, which need not be
            the ones the target wrote, and every answer gets an end, also one that a length limit cut.
        longest: Prompts of more tokens are left out.
        max_length: Where a sequence is cut, > `longest`.
        stops: Tokens that end an answer; none is added if there are none.
        chat_template: Jinja template for a model that comes without one.

    Raises:
        ValueError: If no prompt is left, or the template fails.
    """
    samples = []
    for ids, answer in zip(_turns(tokenizer, prompts, chat_template), answers, strict=True):
        if 0 < len(ids) <= longest:
            answered = [*ids, *tokenizer(answer, add_special_tokens=False)["input_ids"], *stops[:1]]
            samples.append(Sample(answered[:max_length], len(ids)))
    return _not_empty(samples, longest)


def _turns(tokenizer: Any, prompts: Sequence[str], chat_template: str | None) -> Iterator[list[int]]:
    """Token ids of every prompt, in the model's chat template where there is one."""
    template = chat_template or tokenizer.chat_template
    for text in prompts:
        if not template:
            yield tokenizer(text)["input_ids"]
            continue
        turn = [{"role": "user", "content": text}]
        try:
            yield tokenizer.apply_chat_template(
                turn, chat_template=template, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            where = "data.chat_template" if chat_template else f"the chat template of {tokenizer.name_or_path}"
            raise ValueError(
                f"{where} fails on a prompt ({type(error).__name__}: {error}); give another one"
            ) from error


def _not_empty(found: list[T], longest: int) -> list[T]:
    if not found:
        raise ValueError(f"no prompt has 1 to {longest} tokens; allow longer ones or shorten the prompts")
    return found
