"""`python -m llm_kd.cache_teacher --folder F`: store a teacher's distributions, so that training need not run it.

The rest of the command line is that of `llm_kd.fit`, configurations included; train with the same and
`--model.teacher.cache F`.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.cache_teacher")  # before the imports below, which take seconds

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from tqdm.auto import tqdm

from kd_common.hub.language_models import load_config
from kd_common.run.errors import run_command
from kd_common.run.messages import check_device, check_folder, default_device
from llm_kd.data import SPLITS, TokenBatch
from llm_kd.data.loader import TextLoader
from llm_kd.fit import LanguageCLI, build
from llm_kd.head import truncate
from llm_kd.models import TeacherSpec, load_teacher
from llm_kd.teacher import (
    CacheHeader,
    CacheWriter,
    OnlineTeacher,
    TeacherBackbone,
    TeacherCache,
    supervised_counts,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from llm_kd.teacher.records import RecordLayout


def cache_teacher(
    backbone: TeacherBackbone,
    batches: Iterable[TokenBatch],
    folder: str | Path,
    *,
    size: int,
    vocab_size: int,
    teacher: str,
    tokenizer: str,
    source: str | None = None,
    dtype: str = "float16",
    device: torch.device | str = "cpu",
    shard_bytes: int = 2**26,
    progress_bar: bool = True,
) -> TeacherCache:
    """Write a cache, or go on with one whose writing was interrupted; examples it holds already are not run again.

    Args:
        backbone: The teacher.
        batches: The data, in any order; iterated twice, the first time to count what is missing.
        folder: Where to write.
        size: Number K of tokens stored per position, in [1, vocab_size].
        vocab_size: Number V of tokens of the tokenizer.
        teacher: The teacher's name, for people.
        tokenizer: Fingerprint of the vocabulary, `llm_kd.teacher.vocabulary_fingerprint`.
        source: What the teacher was loaded from, `llm_kd.models.TeacherSpec.source`: training on a data set's
            answers then knows the teacher without loading it.
        dtype: Precision of the stored log-probabilities: float16, bfloat16 or float32.
        device: Where the teacher runs.
        shard_bytes: Size of a shard; a kill loses at most one.
        progress_bar: Show one, and say beforehand how much will be written.

    Returns:
        The cache, open for reading.

    Raises:
        CacheError: If the folder holds another cache or a damaged one.
        DiskFullError: If the disk cannot hold what is missing; the part already written is usable.
        ValueError: If `batches` can be iterated only once, a setting is out of its range, or the teacher gives NaN.
    """
    if isinstance(batches, Iterator):
        raise ValueError("batches are iterated twice: pass a list or a DataLoader, not an iterator or a generator")
    weights = weights_fingerprint(backbone)
    header = CacheHeader(teacher, weights, tokenizer, vocab_size, size, dtype)
    online = OnlineTeacher(backbone).to(device)
    with CacheWriter(folder, header, source=source, shard_bytes=shard_bytes) as writer:
        missing: dict[str, int] = {}
        for batch in batches:
            missing.update((k, n) for k, n in zip(batch.keys, supervised_counts(batch), strict=True) if k not in writer)
        tokens = sum(missing.values())
        writer.require_space(tokens, len(missing))
        if progress_bar:
            per_token = header.layout.bytes_per_token
            tqdm.write(
                f"{teacher}: {size} of {vocab_size:,} tokens per position in {dtype}, {per_token} bytes per token; "
                f"{len(missing):,} examples with {tokens:,} tokens to write, {tokens * per_token / 1e6:,.1f} MB"
            )
        with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=not progress_bar) as bar:
            for batch in batches:
                bar.update(_add(writer, online, batch, device))
    return TeacherCache(folder)


def _add(writer: CacheWriter, teacher: OnlineTeacher, batch: TokenBatch, device: torch.device | str) -> int:
    """Store the examples of a batch that the cache lacks; returns the number of their tokens."""
    counts = supervised_counts(batch)
    # Of an example that occurs twice in a batch, the first occurrence is stored.
    new = [key not in writer and key not in batch.keys[:i] for i, key in enumerate(batch.keys)]
    if not any(new):
        return 0
    rows = torch.tensor(new).repeat_interleave(torch.tensor(counts))
    teacher_output = teacher.output(batch.to(device))
    distribution = truncate(teacher_output[rows.to(device)], writer.layout.size, writer.layout.vocab_size)
    kept = [(key, count) for key, count, is_new in zip(batch.keys, counts, new, strict=True) if is_new]
    tokens = batch.labels[batch.predict].cpu()[rows]
    writer.add([key for key, _ in kept], [count for _, count in kept], tokens, distribution)
    return len(tokens)


class CacheCLI(LanguageCLI):
    """The command line of `llm_kd.fit`, so that the two agree on the data; of the run, the data alone are built."""

    command = "cache_teacher"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where and how to store."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--folder", type=str, required=True, help="Where to write; continued if interrupted.")
        parser.add_argument("--size", type=int, default=64, help="Tokens stored per position, K.")
        parser.add_argument("--dtype", type=str, default="float16", help="float16, bfloat16 or float32, as stored.")
        parser.add_argument(
            "--device", type=str | None, default=None, help="Where the teacher runs; a GPU if there is one."
        )

    def instantiate_classes(self) -> None:
        """Build the data."""
        self.datamodule = self.parser.instantiate_classes(Namespace(data=self.config["data"]))["data"]


def main(args: Sequence[str] | None = None) -> TeacherCache:
    """Write the cache for the training and validation examples, and say how to use it."""
    cli = build(args, CacheCLI)
    settings, data = cli.config, cli.datamodule
    settings["device"] = settings["device"] or default_device()
    check_device(settings["device"])
    check_folder("--folder", settings["folder"])
    # The layout refuses a size or dtype that cannot be stored: before the teacher is loaded and answers the prompts.
    RecordLayout(data.vocab_size, settings["size"], settings["dtype"])
    spec = TeacherSpec(**settings["model"]["init_args"]["teacher"])
    data.check_context_length({"teacher": load_config(spec.name)}, SPLITS)
    backbone = load_teacher(spec)
    backbone.to(settings["device"])
    data.write_responses(backbone.model)
    data.setup()
    examples = [example for split in data.splits.values() for example in split.examples]
    cache = cache_teacher(
        backbone,
        TextLoader(examples, data.val_batch_size, pad_id=data.pad_id, shuffle=False),
        settings["folder"],
        size=settings["size"],
        vocab_size=data.vocab_size,
        teacher=spec.name,
        tokenizer=vocabulary_fingerprint(data.encoder.tokenizer.get_vocab()),
        source=spec.source(),
        dtype=settings["dtype"],
        device=settings["device"],
    )
    print(
        f"{len(cache):,} examples, {cache.num_tokens:,} tokens; use it with --model.teacher.cache {settings['folder']}"
    )
    return cache


if __name__ == "__main__":
    run_command(main)
