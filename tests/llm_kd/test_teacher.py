"""Teachers online and from the cache: the same rows, the same loss; layout of records; what identifies a teacher."""

import hashlib
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_common.registry import subclasses
from llm_kd.cache_teacher import cache_teacher
from llm_kd.head import KDHead, LMHead, truncate
from llm_kd.models import Backbone
from llm_kd.objectives import Objective
from llm_kd.selection import Selector
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher import (
    CachedTeacher,
    CacheError,
    DiskFullError,
    OnlineTeacher,
    TeacherCache,
    supervised_counts,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from llm_kd.teacher.records import DTYPES, RecordLayout

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

V = 50


@dataclass(frozen=True)
class Batch:
    """Stand-in for TokenBatch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predict: torch.Tensor
    labels: torch.Tensor
    keys: list

    def to(self, device):
        return replace(self, input_ids=self.input_ids.to(device))


class Model(nn.Module):
    """A teacher whose hidden state depends on token and position; two rows of its head are padding."""

    def __init__(self, seed=0, hidden=8):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(V, hidden, generator=generator))
        self.weight = nn.Parameter(torch.randn(V + 2, hidden, generator=generator))
        self.calls = 0
        self.rope_theta = 1e4

    def forward(self, input_ids, position_ids):
        assert not self.training
        self.calls += 1
        return self.embedding[input_ids] * (1 + position_ids[..., None]).sqrt()

    def settings(self):
        return {"rope_theta": self.rope_theta}

    def lm_head(self):
        return LMHead(self.weight)


def example(number, length=9):
    """Token ids and loss mask: the second half is supervised."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, V, (length + number % 4,), generator=generator)
    return ids, torch.arange(len(ids)) >= length // 2


def batch_of(*rows, width=None):
    """Rows of example numbers, packed from the left."""
    width = width or max(sum(len(example(n)[0]) for n in row) for row in rows)
    ids, positions = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    predict, keys = torch.zeros(len(rows), width, dtype=torch.bool), []
    for i, row in enumerate(rows):
        start = 0
        for n in row:
            tokens, mask = example(n)
            stop = start + len(tokens)
            ids[i, start:stop], positions[i, start:stop] = tokens, torch.arange(len(tokens))
            predict[i, start : stop - 1] = mask[1:]
            keys.append(hashlib.sha256(tokens.numpy().tobytes() + mask.numpy().tobytes()).hexdigest())
            start = stop
        positions[i, start:] = torch.arange(width - start)
    return Batch(ids, positions, predict, ids.roll(-1, 1).masked_fill(~predict, -100), keys)


BATCHES = [batch_of([0], [1]), batch_of([2, 3], [4], width=30), batch_of([5])]


def write(folder, model=None, batches=BATCHES, **settings):
    arguments = {"size": 6, "vocab_size": V, "teacher": "model", "tokenizer": "t", "progress_bar": False} | settings
    return cache_teacher(model or Model(), batches, folder, **arguments)


@pytest.mark.parametrize(("vocab", "width"), [(200, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 4), (151_936, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_records_keep_everything(vocab, width, dtype):
    layout = RecordLayout(vocab, 7, dtype)
    assert layout.bytes_per_token == width * 8 + 7 * DTYPES[dtype].itemsize + 4
    indices = torch.randint(0, vocab, (5, 7))
    indices[0, :2] = torch.tensor([0, vocab - 1])
    log_probs = -torch.rand(5, 7).cumsum(-1)
    tokens, tail = torch.tensor([0, 1, 2, 3, vocab - 1]), torch.rand(5) * 1e-30
    records = layout.pack(tokens, TruncatedDistribution(log_probs, indices, tail, vocab))
    assert records.shape == (5, layout.bytes_per_token)
    assert records.dtype == torch.uint8
    for rows in (slice(0, 5), slice(3, 4), slice(2, 2)):
        found, stored = layout.unpack(records[rows])
        assert torch.equal(found, tokens[rows])
        assert torch.equal(stored.indices, indices[rows].to(torch.int32))
        assert torch.equal(stored.log_probs, log_probs[rows].to(DTYPES[dtype]))
        assert torch.equal(stored.tail_mass, tail[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_survive_rounding(dtype):
    logits = 1e-3 * torch.randn(40, 300)  # most neighbours fall together in 16 bits
    logits[:, 3] = -1e6  # below the smallest float16
    exact = TruncatedDistribution.from_logits(logits, 300)
    layout = RecordLayout(300, 300, dtype)
    _, stored = layout.unpack(layout.pack(torch.zeros(40, dtype=torch.int64), exact))
    assert torch.equal(stored.indices.long(), exact.indices)
    assert (stored.log_probs[:, 1:] <= stored.log_probs[:, :-1]).all()
    assert dtype == "float32" or (stored.log_probs[:, 1:] == stored.log_probs[:, :-1]).any()
    assert stored.log_probs.isfinite().all()


@pytest.mark.parametrize("settings", [(0, 1, "float16"), (2**31, 1, "float16"), (9, 0, "float16"), (9, 10, "float16")])
def test_bad_layouts(settings):
    with pytest.raises(ValueError, match="must lie in"):
        RecordLayout(*settings)
    with pytest.raises(ValueError, match="float16, bfloat16, float32, got 'float64'"):
        RecordLayout(9, 3, "float64")


def test_counts_of_packed_and_padded_sequences():
    assert supervised_counts(BATCHES[0]) == [5, 6]
    assert supervised_counts(BATCHES[1]) == [7, 8, 5]
    empty = replace(BATCHES[2], predict=BATCHES[2].predict & False, keys=[])
    assert supervised_counts(empty) == []
    with pytest.raises(ValueError, match="1 keys but 0 sequences"):
        supervised_counts(replace(empty, keys=["a"]))


def test_online_teacher_gives_the_supervised_rows():
    model = Model().train()
    teacher = OnlineTeacher(model)
    assert teacher.to("cpu") is teacher
    assert not model.training
    batch = BATCHES[1]
    teacher_output = teacher.output(batch)
    assert not teacher_output.hidden.requires_grad
    assert not teacher_output.head.weight.requires_grad
    places = [(i, j) for i in range(2) for j in range(30) if batch.predict[i, j]]
    expected = [model.embedding[batch.input_ids[p]] * (1 + batch.position_ids[p]).sqrt() for p in places]
    torch.testing.assert_close(teacher_output.hidden, torch.stack(expected))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_online_teacher_of_a_transformer(make_model, architecture):
    model = make_model(architecture)
    batch = batch_of([0], [1])
    teacher_output = OnlineTeacher(Backbone(model)).output(batch)
    logits = model(batch.input_ids).logits[batch.predict].log_softmax(-1)
    stored = truncate(teacher_output, 258, 258)
    torch.testing.assert_close(stored.dense_log_probs(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 6, V])
def test_cache_gives_what_the_teacher_gave(tmp_path, size, dtype):
    model = Model()
    cache = CachedTeacher(write(tmp_path, model, size=size, dtype=dtype, shard_bytes=300))
    assert len(cache.cache) == 6
    assert cache.cache.num_tokens == sum(int(batch.predict.sum()) for batch in BATCHES)
    assert size == 1 or len(cache.cache.shards) > 1
    # Other batches than those written, in another order, padded and packed otherwise.
    for batch in (*BATCHES, batch_of([5, 0, 3], [2]), batch_of([4, 1], width=60)):
        exact = truncate(OnlineTeacher(model).output(batch), size, V)
        stored = cache.output(batch)
        assert stored.log_probs.dtype == DTYPES[dtype]
        assert torch.equal(stored.indices.long(), exact.indices)
        close = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-7}
        torch.testing.assert_close(stored.log_probs.float(), exact.log_probs, **close)
        # The float32 products of another batch differ in their last digits, also from machine to machine.
        torch.testing.assert_close(stored.tail_mass, exact.tail_mass, rtol=2e-5, atol=1e-9)


def test_batch_without_supervised_tokens(tmp_path):
    empty = replace(BATCHES[2], predict=BATCHES[2].predict & False, keys=[])
    cache = write(tmp_path, batches=[*BATCHES, empty])
    teacher_output = CachedTeacher(cache).output(empty)
    assert len(teacher_output) == 0
    assert teacher_output.size == 6
    assert len(cache) == 6


@pytest.mark.parametrize("objective", ["ForwardKL", "ReverseKL", "JensenShannon", "AlphaBeta"])
@pytest.mark.parametrize("selector", ["TopK", "SpecK", "AdaKD"])
def test_training_from_a_whole_cache_is_training_online(tmp_path, objective, selector):
    model, batch = Model(), BATCHES[1]
    cached = CachedTeacher(write(tmp_path, model, size=V, dtype="float32"))
    head = KDHead(OBJECTIVES[objective](), SELECTORS[selector](), vocab_size=V, chunk_size=7).eval()
    head.check_truncated(cached.cache.header.size, cached.cache.header.vocab_size)
    rows = int(batch.predict.sum())
    hidden, weight = torch.randn(rows, 5, requires_grad=True), torch.randn(V, 5, requires_grad=True)
    results = []
    for teacher in (OnlineTeacher(model), cached):
        output = head(hidden, LMHead(weight), teacher.output(batch))
        results.append([output.row_loss, output.weights, *torch.autograd.grad(output.loss, [hidden, weight])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert results[0][0].sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_from_a_small_cache_is_a_lower_bound(tmp_path, dtype):
    model, batch = Model(), BATCHES[1]
    hidden, head = torch.randn(int(batch.predict.sum()), 5), LMHead(torch.randn(V, 5))
    loss = KDHead(OBJECTIVES["ReverseKL"](), SELECTORS["TopK"](k=3), vocab_size=V)
    online = loss(hidden, head, OnlineTeacher(model).output(batch))
    previous = torch.zeros_like(online.row_loss)
    for size in (3, 10, 30, 49):
        cached = CachedTeacher(write(tmp_path / str(size), model, size=size, dtype=dtype))
        output = loss(hidden, head, cached.output(batch))
        slack = {"float16": 0.01, "bfloat16": 0.08, "float32": 1e-5}[dtype] * (1 + online.row_loss)
        assert torch.equal(output.accepted, online.accepted)
        assert (output.row_loss <= online.row_loss + slack).all()
        assert (output.row_loss >= previous - slack).all()
        previous = output.row_loss
    torch.testing.assert_close(previous, online.row_loss, rtol=0.08, atol=0.08)


def test_other_supervised_tokens_are_noticed(tmp_path):
    cached = CachedTeacher(write(tmp_path))
    batch = BATCHES[1]
    other_token = replace(batch, labels=batch.labels.where(batch.labels != batch.labels[batch.predict][-1], 0))
    fewer = replace(batch, predict=batch.predict & (batch.position_ids != 5))
    for changed in (other_token, fewer):
        with pytest.raises(CacheError, match=f"example ({'|'.join(batch.keys)}) was stored in .* other supervised"):
            cached.output(changed)
    cached.output(batch)


def test_fingerprints_tell_teachers_and_vocabularies_apart():
    base = weights_fingerprint(Model())
    assert base == weights_fingerprint(Model())
    assert len(base) == 64
    seen = {base, weights_fingerprint(Model(seed=1)), weights_fingerprint(Model().bfloat16())}
    for change in ("embedding", "weight"):
        model = Model()
        getattr(model, change).data[-1, -1] += 1e-3
        seen.add(weights_fingerprint(model))
    for head in (LMHead(Model().weight, torch.ones(V + 2)), LMHead(Model().weight, None, 30.0)):
        model = Model()
        model.lm_head = lambda head=head: head
        seen.add(weights_fingerprint(model))
    model = Model()
    model.rope_theta = 1e6
    seen.add(weights_fingerprint(model))
    assert len(seen) == 8
    names = [vocabulary_fingerprint(v) for v in ({"a": 0, "b": 1}, {"b": 1, "a": 0}, {"a": 1, "b": 0}, {"a": 0})]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_caching_runs_what_is_missing_once(tmp_path, capsys):
    model = Model()
    write(tmp_path, model, [BATCHES[0]], progress_bar=True)
    printed = capsys.readouterr()
    assert "model: 6 of 50 tokens per position in float16, 23 bytes per token; 2 examples with 11 tokens" in printed.out
    assert "11.0/11.0" in printed.err
    assert model.calls == 1
    repeated = [*BATCHES, batch_of([0, 5], [5, 6], [6])]  # within a batch, and across batches
    cache = write(tmp_path, model, repeated)
    assert model.calls == 1 + 3
    assert cache.complete
    assert len(cache) == 7
    at_once = CachedTeacher(write(tmp_path / "at_once", batches=repeated[::-1])).output(repeated[-1])
    in_turns = CachedTeacher(cache).output(repeated[-1])
    assert torch.equal(in_turns.indices, at_once.indices)
    torch.testing.assert_close(in_turns.log_probs, at_once.log_probs, rtol=2**-9, atol=1e-6)
    torch.testing.assert_close(in_turns.tail_mass, at_once.tail_mass, rtol=2e-5, atol=1e-9)
    write(tmp_path, model, repeated)
    assert model.calls == 1 + 3


def test_caching_refuses_what_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="iterated twice: pass a list or a DataLoader"):
        write(tmp_path, batches=iter(BATCHES))
    with pytest.raises(ValueError, match=r"size must lie in \[1, 50\]"):
        write(tmp_path, size=51)
    with pytest.raises(ValueError, match="dtype must be one of"):
        write(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="exceeds the 52 rows of the teacher's head"):
        write(tmp_path / "wide", vocab_size=53)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    model = Model()
    with pytest.raises(DiskFullError, match="bytes, 1,000 are free"):
        write(tmp_path / "small", model)
    assert model.calls == 0


def test_a_teacher_that_gives_nan_keeps_what_was_good(tmp_path):
    model = Model()
    bad_token = int(BATCHES[2].input_ids[BATCHES[2].predict][0])
    good = [batch for batch in BATCHES if bad_token not in batch.input_ids[batch.predict]]
    assert good
    model.embedding.data[bad_token] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        write(tmp_path, model, [*good, BATCHES[2]])
    cache = TeacherCache(tmp_path)
    assert len(cache) == sum(len(batch.keys) for batch in good)
    assert not cache.complete
