"""Conversations for training and validation, from files or written by the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from kd_common.errors import UserError
from kd_common.hub.language_models import load_tokenizer
from kd_common.run.messages import check_batch_size
from kd_common.run.training import obtain_for
from kd_common.sampling import SamplingParams
from kd_common.text import Row, encode_each, read_rows
from llm_kd.data.encode import Encoder, padding_token
from llm_kd.data.example import Example, prompt_response_example
from llm_kd.data.loader import TextLoader
from llm_kd.data.responses import write_responses
from llm_kd.models import vocabulary_size
from llm_kd.models.context_length import check_context_length, context_length

SPLITS = ("train", "val")
# Greedy: drawn at temperature 1, the answers of a small teacher are often nonsense.
DEFAULT_SAMPLING = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Split:
    """Examples of one split, and what became of its rows.

    Attributes:
        examples: What is left to train or validate on.
        rows: Number of rows read.
        dropped: Number of rows left out because they are too long.
        max_tokens: Most tokens that a row may have, or its prompt where the teacher writes the response.
    """

    examples: list[Example]
    rows: int
    dropped: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def supervised(self) -> int:
        """Return the number of tokens that carry a loss."""
        return sum(example.num_supervised for example in self.examples)

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {len(self.examples):,} examples, {self.supervised:,} of {self.tokens:,} tokens carry "
            f"a loss; {self.dropped:,} rows of more than {self.max_tokens} tokens dropped"
        )


class TextDataModule(LightningDataModule):
    """Batches of conversations; see `llm_kd.data.TokenBatch`.

    With `responses: teacher`, `write_responses` must be called before training. The loss then lies on what the
    teacher wrote; an answer of the data set remains the reference that generations are compared with.

    Args:
        tokenizer: Name of the tokenizer; see `kd_common.hub.language_models.load_tokenizer`.
        train: File or files of the training rows, .jsonl or .parquet (see `llm_kd.data.read_rows`), or the name
            of a packaged set.
        val: The same for validation.
        responses: `dataset`: learn from the answers in the files; `teacher`: from the teacher's, written once.
        fields: The files' own names of `messages`, `instruction`, `input`, `output`, `instances`, `system`.
        system: System turn for conversations that have none.
        max_length: Largest number of tokens of a conversation; longer ones are dropped and counted. A prompt for the
            teacher must leave room for `sampling.max_new_tokens`.
        truncate: Cut longer conversations of a data set instead; a cut answer has no end-of-turn token.
        batch_size: Rows of a training batch on one rank.
        val_batch_size: Conversations of a validation batch on one rank.
        packing: Put several conversations into a training row of at most `max_length` tokens.
        limit_train: Use only the first rows for training.
        limit_val: Use only the first rows for validation.
        sampling: How the teacher's responses are drawn; greedily unless set.
        sampling_seed: Seed of the teacher's responses, apart from `seed` so that runs with other seeds share them.
        generation_batch_size: Prompts the teacher answers at once.
        seed: Seed of the order.

    Attributes:
        prompts_only: Deliver the training prompts without answers, for a student that writes all responses itself: the
            rows need none, and the teacher writes none for them. `llm_kd.fit` sets it; validation is unaffected.

    Raises:
        UserError: If a setting is out of its range, or without effect.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | list[str] = "prompts/train",
        val: str | list[str] = "prompts/val",
        responses: Literal["dataset", "teacher"] = "teacher",
        fields: dict[str, str] | None = None,
        system: str | None = None,
        max_length: int = 512,
        truncate: bool = False,
        batch_size: int = 8,
        val_batch_size: int = 8,
        packing: bool = False,
        limit_train: int | None = None,
        limit_val: int | None = None,
        sampling: SamplingParams = DEFAULT_SAMPLING,
        sampling_seed: int = 0,
        generation_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"max_length": max_length, "batch_size": batch_size, "val_batch_size": val_batch_size}
        limits = {"limit_train": limit_train, "limit_val": limit_val, "generation_batch_size": generation_batch_size}
        for name, value in (sizes | limits).items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if responses not in ("dataset", "teacher"):
            raise UserError(f"responses must be 'dataset' or 'teacher', got {responses!r}")
        if truncate and responses == "teacher":
            raise UserError("truncate cuts a data set's answers; a teacher's are limited by sampling.max_new_tokens")
        if responses == "teacher" and max_length <= sampling.max_new_tokens:
            raise UserError(
                f"data.max_length {max_length} leaves no room for a prompt before the teacher's answer of up to "
                f"data.sampling.max_new_tokens {sampling.max_new_tokens}; raise the one or lower the other"
            )
        self.tokenizer_name, self.responses, self.fields, self.system = tokenizer, responses, fields, system
        self.files = {"train": _listed(train), "val": _listed(val)}
        self.limits = {"train": limit_train, "val": limit_val}
        self.max_length, self.truncate = max_length, truncate
        self.packing, self.prompts_only = packing, False
        self.batch_size, self.val_batch_size, self.seed = batch_size, val_batch_size, seed
        self.sampling, self.sampling_seed, self.generation_batch_size = sampling, sampling_seed, generation_batch_size
        self.splits: dict[str, Split] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """Return the tokenizer, and how it writes conversations."""
        return Encoder(load_tokenizer(self.tokenizer_name), self.system)

    @property
    def vocab_size(self) -> int:
        """Return the rows of the models' heads that the tokenizer needs; see `llm_kd.models.vocabulary_size`."""
        return vocabulary_size(self.encoder.tokenizer)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a response."""
        return self.encoder.eos_ids

    @property
    def pad_id(self) -> int:
        """Token that fills up rows: the tokenizer's, or one that ends a response if it has none."""
        return padding_token(self.encoder.tokenizer, self.eos_ids)

    def rows(self, split: str) -> list[Row]:
        """Return the conversations of `train` or `val` as they stand in the files, too long ones included.

        Raises:
            UserError, RowsError: From the data.
        """
        rows = [row for name in self.files[split] for row in read_rows(find_data(name), self.fields)]
        return rows[: self.limits[split]]

    def write_responses(self, teacher: Any, *, splits: Sequence[str] = SPLITS, progress_bar: bool = True) -> None:
        """Have the teacher answer the prompts, or read what it answered before.

        Does nothing with `responses: dataset`.

        Args:
            teacher: Model that `llm_kd.models.generation.generate` takes, on the device it is to run on.
            splits: Which prompts; `val` alone is enough for validation.
            progress_bar: Show one while writing.

        Raises:
            UserError, RowsError, EncodingError: From data or cache.
        """
        if self.responses == "dataset":
            return
        for split in splits:
            if split == "train" and self.prompts_only:
                continue
            rows = self.rows(split)
            kept = self._prompts(rows, self._prompt_budget)
            if own := sum(row.answered for row in rows):
                rank_zero_info(
                    f"{split}: {own:,} rows have answers of their own, which stay references; the loss falls on the "
                    "teacher's (data.responses teacher)"
                )
            written = write_responses(
                teacher,
                [prompt for _, prompt in kept],
                self.sampling,
                tokenizer=self.encoder.tokenizer,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                seed=self.sampling_seed,
                batch_size=self.generation_batch_size,
                progress_bar=progress_bar,
            )
            examples = [
                prompt_response_example(
                    prompt, response.tokens, row.messages[-1].content if row.answered else response.text
                )
                for (row, prompt), response in zip(kept, written, strict=True)
            ]
            if cut := sum(not set(response.tokens[-1:]) & set(self.eos_ids) for response in written):
                rank_zero_info(
                    f"{split}: {cut:,} of the teacher's {len(written):,} responses end at data.sampling.max_new_tokens "
                    f"{self.sampling.max_new_tokens}, without a closing token"
                )
            self._keep(split, rows, examples, self._prompt_budget)

    def setup(self, stage: str | None = None) -> None:
        """Let the training module obtain the teacher, who may have to answer, and `read`."""
        obtain_for(self)
        self.read(stage)

    def read(self, stage: str | None = None) -> None:
        """Read and encode the splits, once.

        Raises:
            UserError, RowsError, EncodingError: From the data.
            UserError: If the teacher is to write the responses and has not done so, or if no example is left.
        """
        for split in SPLITS if stage in (None, "fit") else ("val",):
            if self._awaits_answers(split):
                raise UserError(
                    "the teacher has not answered the prompts yet: call write_responses(teacher) before training, "
                    "or set responses to dataset if the files hold answers"
                )
            self._read(split)

    def longest(self, split: str) -> int:
        """Return the tokens of the longest conversation of a split, with the longest answer that a teacher may write.

        Raises:
            UserError, RowsError, EncodingError: From the data.
        """
        if self._awaits_answers(split):
            return self.longest_prompt(split) + self.sampling.max_new_tokens
        self._read(split)
        return max(len(example.input_ids) for example in self.splits[split].examples)

    def check_context_length(self, configs: Mapping[str, Any], splits: Sequence[str]) -> None:
        """Refuse conversations beyond the positions of the models that read them.

        Args:
            configs: Configurations of the models, by what to call these.
            splits: Which of `train` and `val` are read; the teacher need not have answered yet.

        Raises:
            UserError, RowsError, EncodingError: From the data.
            UserError: If a model has too few.
        """
        fewest = min(map(context_length, configs.values()))
        hint = f"set data.max_length to {fewest} or less, so that longer ones are left out and counted"
        for split in splits:
            check_context_length(configs, self.longest(split), f"{split}: conversations", hint)

    def longest_prompt(self, split: str) -> int:
        """Return the tokens of the longest prompt of `train` or `val`; see `longest`."""
        return max(self.prompt_lengths(split))

    def prompt_lengths(self, split: str) -> list[int]:
        """Return the tokens of every prompt of `train` or `val`; see `longest`."""
        if self._awaits_answers(split):
            rows = self.rows(split)
            prompts = self._prompts(rows, self._prompt_budget)
            if not prompts:
                raise self._none_fits(split, len(rows))
            return [len(prompt) for _, prompt in prompts]
        self._read(split)
        return [example.prompt_length for example in self.splits[split].examples]

    def first_prompt(self, split: str) -> list[int]:
        """Return the tokens of the first prompt of `train` or `val` that is used."""
        if self._awaits_answers(split):
            rows = self.rows(split)
            prompts = (self.encoder.prompt(row) for row in rows)
            return next(prompt for prompt in prompts if len(prompt) <= self._prompt_budget)
        self._read(split)
        example = self.splits[split].examples[0]
        return example.input_ids[: max(1, example.prompt_length)]

    def train_dataloader(self) -> TextLoader:
        """Return the batches of this rank's share, in a new order every epoch."""
        loader = self._loader("train")
        if loader.left_out:
            rank_zero_info(
                f"train: {loader.left_out} of {len(loader.rows)} rows do not fill a batch; others each epoch"
            )
        return loader

    def val_dataloader(self) -> TextLoader:
        """Return the validation conversations of this rank, each exactly once over all ranks."""
        return self._loader("val")

    def check_batch(self, world_size: int) -> int:
        """Refuse training data that do not fill a batch on each process; later, Lightning would be training already.

        Before the teacher has answered its prompts are counted. Packing may leave fewer rows, so ask again afterwards.

        Returns:
            Batches of an epoch on each process.

        Raises:
            UserError, RowsError, EncodingError: From the data.
            UserError: If they do not.
        """
        if self._awaits_answers("train"):
            prompts = self._prompts(self.rows("train"), self._prompt_budget)
            check_batch_size(len(prompts), "training rows", self.batch_size, world_size)
            return len(prompts) // (self.batch_size * world_size)
        self._read("train")
        return len(self._loader("train", world_size))

    def _loader(self, split: str, world_size: int | None = None) -> TextLoader:
        train = split == "train"
        return TextLoader(
            self.splits[split].examples,
            self.batch_size if train else self.val_batch_size,
            pad_id=self.pad_id,
            shuffle=train,
            pack_length=self.max_length if train and self.packing else None,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size or (self.trainer.world_size if self.trainer else 1),
        )

    @property
    def _prompt_budget(self) -> int:
        """Most tokens of a prompt that the teacher answers."""
        return self.max_length - self.sampling.max_new_tokens

    @property
    def awaits_answers(self) -> bool:
        """Return whether the teacher is to answer prompts and has not."""
        return any(map(self._awaits_answers, SPLITS))

    def _awaits_answers(self, split: str) -> bool:
        """Return whether the teacher is to answer a split's prompts and has not."""
        prompts_only = self.prompts_only and split == "train"
        return self.responses == "teacher" and not prompts_only and split not in self.splits

    def _read(self, split: str) -> None:
        """Encode a split that needs no teacher, once."""
        if split in self.splits:
            return
        rows = self.rows(split)
        if self.prompts_only and split == "train":
            prompts = self._prompts(rows, self.max_length)
            self._keep(split, rows, [prompt_response_example(prompt, [], "") for _, prompt in prompts], self.max_length)
        else:
            examples = encode_each(rows, lambda row: self.encoder.example(row, self.max_length, self.truncate))
            self._keep(split, rows, [example for example in examples if example is not None], self.max_length)

    def _prompts(self, rows: Sequence[Row], budget: int) -> list[tuple[Row, list[int]]]:
        """Return the rows whose prompt has at most `budget` tokens, each with its prompt."""
        prompts = encode_each(rows, self.encoder.prompt)
        return [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if len(prompt) <= budget]

    def _keep(self, split: str, rows: Sequence[Row], examples: list[Example], max_tokens: int) -> None:
        found = Split(examples, rows=len(rows), dropped=len(rows) - len(examples), max_tokens=max_tokens)
        limit = self.limits[split]
        rank_zero_info(f"{split}{f', at most {limit:,} rows (limit_{split})' if limit else ''}: {found}")
        if not examples:
            raise self._none_fits(split, len(rows))
        self.splits[split] = found

    def _none_fits(self, split: str, rows: int) -> ValueError:
        return ValueError(
            f"{split}: none of the {rows} rows fits max_length={self.max_length}; raise it, set truncate for the "
            "answers of a data set, or lower sampling.max_new_tokens for the teacher's"
        )


def find_data(name: str) -> Path:
    """Return a data file by its path, or a packaged one by its name.

    Raises:
        UserError: If there is neither; the message lists the packaged ones.
    """
    packaged = Path(__file__).parent
    for path in (Path(name).expanduser(), packaged / f"{name}.jsonl"):
        if path.is_file():
            return path
    names = ", ".join(sorted(f"prompts/{path.stem}" for path in (packaged / "prompts").glob("*.jsonl")))
    raise UserError(f"{name}: no such data file, and no packaged set of that name ({names})")


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
