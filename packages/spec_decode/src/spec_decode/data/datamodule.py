"""Training text that the target wrote, with its features computed on the fly or read from disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from kd_common.checks import at_least
from kd_common.errors import UserError
from kd_common.files import cache_root, locked
from kd_common.run.loading import WorkerLoader
from kd_common.run.messages import check_batch_size
from kd_common.run.training import obtain_for
from kd_common.text import AnswerCache, Row
from spec_decode.data.corpus import (
    Sample,
    as_samples,
    corpus,
    encode_answers,
    encode_prompts,
    write_corpus,
)
from spec_decode.data.features import FeatureStore, split_states
from spec_decode.data.prompts import packaged_prompts, read_asked
from spec_decode.decoding.sampling import Sampling
from spec_decode.models import CausalLM, States

DEFAULT_SAMPLING = Sampling(temperature=0.0, max_new_tokens=128)


@dataclass(eq=False)  # not frozen: Lightning's precision plugins replace its fields
class DraftBatch:
    """Sequences to learn from.

    Args:
        tokens: int64 of shape (B, T), right-padded with 0.
        answer: True at the tokens of answers, shape (B, T).
        states: The target's states, shapes (B, T, .); None where they are to be computed.
    """

    tokens: Tensor
    answer: Tensor
    states: States | None = None

    def to(self, device: torch.device) -> "DraftBatch":
        """Move the batch to a device."""
        states = self.states and States(self.states.features.to(device), self.states.final.to(device))
        return replace(self, tokens=self.tokens.to(device), answer=self.answer.to(device), states=states)


class Sequences(Dataset):
    """Samples, each with its stored states if there are any; at -1, text without an answer."""

    def __init__(self, samples: Sequence[Sample], store: FeatureStore | None, first: int = 0) -> None:
        self.samples, self.store, self.first = samples, store, first

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor | None]:
        if index == -1:
            sample, states = self[0]
            return replace(sample, answer_start=len(sample.tokens)), states
        return self.samples[index], self.store.read(self.first + index) if self.store else None


def collate(items: Sequence[tuple[Sample, Tensor | None]]) -> DraftBatch:
    """Pad samples on the right."""
    longest = max(len(sample.tokens) for sample, _ in items)
    tokens = torch.zeros(len(items), longest, dtype=torch.int64)
    answer = torch.zeros(len(items), longest, dtype=torch.bool)
    stored = []
    for row, (sample, states) in enumerate(items):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        answer[row, sample.answer_start : len(sample.tokens)] = True
        if states is not None:
            stored.append(torch.nn.functional.pad(states, (0, 0, 0, longest - len(states))))
    return DraftBatch(tokens, answer, split_states(torch.stack(stored)) if stored else None)


class StreamSampler(DistributedSampler):
    """One rank's rows of an epoch of any length, taken from an endless stream of reshuffled passes over the samples.

    Epoch e of n rows holds rows e n to (e + 1) n - 1 of the stream, whose passes are permutations drawn from the seed
    and the number of the pass: an epoch is a function of its number, so that a run resumes exactly, and short epochs
    lose no samples. Rank r takes rows r, r + ranks, ... of it, from its row `first` on, once.

    Samples of an update are about equally long, which saves padding: a permutation is sorted within pools of eight
    updates, which are then shuffled. So the updates do not depend on how their samples are shared out.

    Args:
        lengths: Length of every sample.
        batch: Samples per update: of all ranks and accumulated batches together.
        rows: n, a multiple of the number of ranks.
        seed: Seed of the order.
        rank: This process.
        ranks: Number of processes.
    """

    def __init__(self, lengths: Sequence[int], batch: int, rows: int, *, seed: int, rank: int, ranks: int) -> None:
        super().__init__(lengths, ranks, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.batch, self.rows = torch.tensor(lengths), batch, rows
        self.num_samples, self.first = rows // ranks, 0

    def _permutation(self, number: int) -> Tensor:
        """Order of the samples in one pass."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(8 * self.batch)]
        batches = torch.cat(pools).split(self.batch)  # only the last of them can be short, and stays there
        full = len(self.lengths) // self.batch
        shuffled = torch.randperm(full, generator=generator).tolist()
        return torch.cat([batches[i] for i in [*shuffled, *range(full, len(batches))]])

    def __iter__(self) -> Iterator[int]:
        start, count, passes = self.epoch * self.rows, len(self.lengths), {}
        places = range(start + self.rank, start + self.num_samples * self.num_replicas, self.num_replicas)
        first, self.first = self.first, 0
        for place in places[first:]:
            number = place // count
            if number not in passes:
                passes[number] = self._permutation(number)
            yield int(passes[number][place % count])


class TargetText(LightningDataModule):
    """The target's own answers to prompts.

    Args:
        prompts: JSONL or Parquet file of prompts (see `read_asked`); None means the packaged ones.
        limit: Take at most so many prompts.
        val_prompts: Prompts, the last ones, kept for validation and the final measurement.
        answers: `target` has the target answer the prompts; `file` takes the answers beside them in the file, which
            should be the target's own, written by a server made for that.
        sampling: How the target's answers are drawn, greedily unless set, and the room that an answer is left.
        sampling_seed: Seed of the target's answers, apart from `seed` so that runs with other seeds share them.
        generation_batch_size: Prompts the target answers at once.
        features: `online` runs the target on every batch; `cached` stores its states once and reads them.
        max_length: Longest sequence in tokens, prompt included.
        epoch_rows: Sequences per epoch; None means one pass over all.
        batch_size: Sequences a batch on one rank.
        chat_template: Jinja template that takes the place of the target's, here and where the drafter is used.
        seed: Seed of the order; linked from `seed_everything`.

    Raises:
        UserError: If a setting is out of range.
    """

    def __init__(
        self,
        prompts: str | None = None,
        limit: int | None = None,
        val_prompts: int = 16,
        answers: Literal["target", "file"] = "target",
        sampling: Sampling = DEFAULT_SAMPLING,
        sampling_seed: int = 0,
        generation_batch_size: int = 16,
        features: Literal["online", "cached"] = "cached",
        max_length: int = 512,
        epoch_rows: int | None = None,
        batch_size: int = 4,
        chat_template: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("limit", limit), ("epoch_rows", epoch_rows)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be >= 1, or null, got {value}")
        at_least("data.val_prompts", val_prompts, 1)
        at_least("data.batch_size", batch_size, 1)
        at_least("data.generation_batch_size", generation_batch_size, 1)
        if max_length <= sampling.max_new_tokens:
            raise UserError(
                f"data.max_length {max_length} leaves no room for a prompt beside an answer of "
                f"data.sampling.max_new_tokens {sampling.max_new_tokens} tokens"
            )
        if answers == "file" and prompts is None:
            raise UserError("data.answers file needs the file: set data.prompts")
        asked = [] if prompts is None else read_asked(Path(prompts), answered=answers == "file")[:limit]
        self.texts: Sequence[str | Row] = [one.prompt for one in asked] if prompts else packaged_prompts()[:limit]
        self.answers = [one.answer for one in asked if one.answer] if answers == "file" else None
        if later := sum(one.later > 0 for one in asked):
            rank_zero_info(
                f"{later:,} of {len(asked):,} conversations go on behind their first answer: what follows is left out"
            )
        if own := sum(one.answer is not None for one in asked if answers == "target"):
            rank_zero_info(f"{own:,} prompts have answers in the file: left out, the target answers (data.answers)")
        if len(self.texts) <= val_prompts:
            raise UserError(f"{len(self.texts)} prompts leave none to train on beside data.val_prompts {val_prompts}")
        self.val_prompts, self.features, self.max_length = val_prompts, features, max_length
        self.epoch_rows, self.batch_size, self.chat_template, self.seed = epoch_rows, batch_size, chat_template, seed
        self.sampling, self.sampling_seed = sampling, sampling_seed
        self.generation_batch_size = generation_batch_size
        self._target: list[CausalLM] = []
        self.encoded: list[list[int]] = []
        self.stops: tuple[int, ...] = ()
        self.samples: list[Sample] = []
        self.progress = True

    def attach(self, target: CausalLM, tokenizer: Any, stops: Sequence[int], ranks: int = 1) -> None:
        """Let this target answer the prompts.

        Args:
            target: Target.
            tokenizer: Its tokenizer.
            stops: Tokens that end an answer.
            ranks: Processes that train together.

        Raises:
            UserError: If its context is too short, no prompt short enough, or an epoch too short for a batch.
        """
        if self.max_length > target.context:
            raise UserError(f"data.max_length {self.max_length} exceeds the target's context {target.context}")
        self._target, self.stops = [target], tuple(stops)
        longest = self.max_length - self.sampling.max_new_tokens
        if self.answers is None:
            self.encoded = encode_prompts(tokenizer, self.texts, longest=longest, chat_template=self.chat_template)
        else:
            self.samples = encode_answers(
                tokenizer,
                self.texts,
                self.answers,
                longest=longest,
                max_length=self.max_length,
                chat_template=self.chat_template,
            )
            self.encoded = [sample.tokens[: sample.answer_start] for sample in self.samples]
        if len(self.encoded) <= self.val_prompts:
            raise UserError(
                f"{len(self.encoded)} prompts of at most {longest} tokens leave none to train on beside "
                f"data.val_prompts {self.val_prompts}"
            )
        self._rows_of_an_epoch(len(self.encoded) - self.val_prompts, ranks)  # refused before the target has written

    def _rows_of_an_epoch(self, rows: int, ranks: int) -> int:
        """Sequences of an epoch of all ranks, whole batches only, of so many to train on."""
        what = "sequences of data.epoch_rows" if self.epoch_rows else "training sequences"
        rows, batch = self.epoch_rows or rows, self.batch_size * ranks
        check_batch_size(rows, what, self.batch_size, ranks)
        return rows // batch * batch

    def epoch_length(self, ranks: int) -> int:
        """Sequences of an epoch of all ranks; see `attach`."""
        return self._rows_of_an_epoch(len(self.encoded) - self.val_prompts, ranks)

    @property
    def attached(self) -> bool:
        """Return whether a target is attached."""
        return bool(self._target)

    @property
    def target(self) -> CausalLM:
        """Return the attached target.

        Raises:
            UserError: If there is none.
        """
        if not self._target:
            raise UserError("no target is attached; call attach(...) or train with a DrafterModule")
        return self._target[0]

    @property
    def held_out(self) -> list[list[int]]:
        """Prompts that are not trained on."""
        return self.encoded[-self.val_prompts :]

    @property
    def _corpus(self) -> AnswerCache:
        read, drawn = self.encoded, (self.sampling, self.sampling_seed, self.generation_batch_size)
        if self.answers is not None:  # how the target would have written them does not matter
            read, drawn = [sample.tokens for sample in self.samples], (DEFAULT_SAMPLING, 0, 1)
        sampling, seed, batch_size = drawn
        folder = cache_root() / "spec_decode"
        return corpus(folder, self.target, read, sampling, stops=self.stops, seed=seed, batch_size=batch_size)

    def _store(self) -> FeatureStore:
        folder = self._corpus.path.with_suffix("")
        return FeatureStore(folder, [s.tokens for s in self.samples], self.target.shape.hidden_size)

    def prepare_data(self) -> None:
        """Write what is missing of text and features; one process does it, of several machines one after the other.

        Raises:
            OSError: If the disk is too small for the features.
        """
        obtain_for(self)
        if self.answers is not None and self.features == "online":
            return
        if self.trainer is not None:
            self.target.to(self.trainer.strategy.root_device)
        if self._stored():
            return
        if self.answers is None:
            how: dict[str, Any] = {"stops": self.stops, "seed": self.sampling_seed, "progress": self.progress}
            self.samples = write_corpus(self._corpus, self.target, self.sampling, **how)
        if self.features == "cached":
            store = self._store()
            with locked(store.folder, "the target's features"):
                if store.done < len(self.samples):
                    rank_zero_info(f"Feature cache: {store.size / 1e9:.2f} GB in {store.folder}")
                store.write(self.target, progress=self.progress)

    def _stored(self) -> bool:
        """Read the text, and return whether text and features are complete, as in a read-only cache."""
        self.setup()
        if self.answers is None and len(self.samples) < len(self.encoded):
            return False
        return self.features == "online" or self._store().done == len(self.samples)

    def setup(self, stage: str | None = None) -> None:
        """Read the text that the target wrote."""
        obtain_for(self)
        if self.answers is None:
            self.samples = as_samples(self.encoded, found) if (found := self._corpus.read()) is not None else []

    def token_counts(self) -> Tensor:
        """Occurrences of every token in the training answers, int64 of shape (V,)."""
        tokens = [token for s in self.samples[: -self.val_prompts] for token in s.tokens[s.answer_start :]]
        return torch.tensor(tokens).bincount(minlength=self.target.vocab_size)

    def _loader(self, samples: Sequence[Sample], first: int, sampler: Any) -> WorkerLoader:
        store = self._store() if self.features == "cached" else None
        return WorkerLoader(
            Sequences(samples, store, first), self.batch_size, sampler=sampler, collate_fn=collate, drop_last=False
        )

    @property
    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> WorkerLoader:
        """Return the batches of this rank's rows of the epoch.

        Raises:
            UserError: If they do not fill one batch per rank.
        """
        samples, (rank, ranks) = self.samples[: -self.val_prompts], self._place
        rows = self._rows_of_an_epoch(len(samples), ranks)
        lengths = [len(sample.tokens) for sample in samples]
        update = self.batch_size * ranks * (self.trainer.accumulate_grad_batches if self.trainer else 1)
        sampler = StreamSampler(lengths, update, rows, seed=self.seed, rank=rank, ranks=ranks)
        return self._loader(samples, 0, sampler)

    def val_dataloader(self) -> WorkerLoader:
        """Return this rank's share of the validation sequences, filled up with text without answers."""
        rank, ranks = self._place
        first = len(self.samples) - self.val_prompts
        return self._loader(self.samples[first:], first, _Share(self.val_prompts, rank, ranks))


class _Share(DistributedSampler):
    """Rows r, r + ranks, ..., as many for every rank, since all run the passes of a sharded target together.

    No row is repeated: those beyond the last one are blank.
    """

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        super().__init__(range(count), ranks, rank, shuffle=False)  # type: ignore[arg-type]
        self._rows = [row if row < count else -1 for row in range(rank, self.total_size, ranks)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)
