"""The cache on disk: kills, full disks, damage, foreign caches, repeated and missing examples."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher import CacheError, CacheHeader, CacheWriter, DiskFullError, TeacherCache

V, K = 300, 4
HEADER = CacheHeader("model", "w" * 64, "t" * 64, V, K, "float16")


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def example(number):
    """Key, tokens and the teacher's rows of an example."""
    generator = torch.Generator().manual_seed(number)
    rows = 3 + number % 4
    tokens = torch.randint(0, V, (rows,), generator=generator)
    return key(number), tokens, TruncatedDistribution.from_logits(torch.randn(rows, V, generator=generator), K)


def add(writer, numbers):
    for number in numbers:
        name, tokens, rows = example(number)
        if name not in writer:
            writer.add([name], [len(tokens)], tokens, rows)


def write(folder, numbers=range(12), header=HEADER, shard_bytes=200):
    with CacheWriter(folder, header, shard_bytes=shard_bytes) as writer:
        add(writer, numbers)
    return TeacherCache(folder)


def assert_holds(cache, numbers):
    assert list(cache.keys()) == [key(n) for n in numbers]
    for number in numbers:
        name, tokens, rows = example(number)
        counts, found, stored = cache.read([name])
        assert name in cache
        assert counts == [len(tokens)]
        assert torch.equal(found, tokens)
        assert torch.equal(stored.indices.long(), rows.indices)
        assert torch.equal(stored.log_probs, rows.log_probs.half())
        assert torch.equal(stored.tail_mass, rows.tail_mass)


def test_a_new_writer_knows_what_is_stored(tmp_path):
    write(tmp_path / "cache", range(5))
    with CacheWriter(tmp_path / "cache", HEADER) as writer:
        assert [key(number) in writer for number in range(6)] == [True] * 5 + [False]
        name, tokens, rows = example(3)
        with pytest.raises(ValueError, match="stored once only"):
            writer.add([name], [len(tokens)], tokens, rows)
        add(writer, [5])
    assert_holds(TeacherCache(tmp_path / "cache"), range(6))
    assert sum(shard.examples for shard in TeacherCache(tmp_path / "cache").shards) == 6


def test_written_and_read(tmp_path):
    cache = write(tmp_path / "new" / "folder")
    assert_holds(cache, range(12))
    assert len(cache.shards) > 3
    assert cache.complete
    assert key(99) not in cache
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    layout = HEADER.layout
    assert manifest["bytes_per_token"] == layout.bytes_per_token == 2 * (K + 1) + 2 * K + 4
    assert (manifest["examples"], manifest["tokens"]) == (12, cache.num_tokens)
    sizes = [(cache.folder / shard.file).stat().st_size for shard in cache.shards]
    assert sizes == [shard.bytes for shard in cache.shards]
    assert sum(sizes) < cache.num_tokens * layout.bytes_per_token + 12 * 48 + 2048 * len(sizes)
    counts, tokens, rows = cache.read([key(7), key(0), key(7)])
    assert counts == [6, 3, 6]
    assert torch.equal(tokens[:6], tokens[9:])
    assert len(rows) == 15
    assert not list(cache.folder.glob("*.tmp"))


def interrupted(stop, error):
    yield from range(stop)
    raise error


def test_writing_goes_on_where_it_stopped(tmp_path):
    for stop, kind in ((5, ZeroDivisionError), (7, KeyboardInterrupt)):
        with pytest.raises(kind):
            write(tmp_path, interrupted(stop, kind), shard_bytes=10**6)
        cache = TeacherCache(tmp_path)
        assert_holds(cache, range(stop))  # the unfinished shard was written too
        assert not cache.complete
        with pytest.raises(CacheError, match="interrupted"):
            cache.read([key(11)])
    (tmp_path / "shard-00002.safetensors.tmp").write_bytes(b"half a shard")
    (tmp_path / "shard-00002.safetensors").write_bytes(b"renamed, but the manifest was not yet written")
    cache = write(tmp_path)
    assert_holds(cache, range(12))
    assert cache.complete
    assert len(write(tmp_path, range(14))) == 14  # a complete cache can grow


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
import test_teacher_cache as t
with t.CacheWriter({folder!r}, t.HEADER, shard_bytes=200) as writer:
    for number in range(1000):
        t.add(writer, [number])
        print(number, flush=True)
        time.sleep(0.002)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_complete_shards(tmp_path):
    folder = tmp_path / "cache"
    script = KILLED.format(here=str(Path(__file__).parent), folder=str(folder))
    stopped = 0
    for wanted in (20, 47):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        while int(process.stdout.readline()) < wanted:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        cache = TeacherCache(folder)
        assert stopped < len(cache) <= 1000
        assert len(cache) >= wanted - 4  # at most a shard's examples are lost
        stopped = len(cache)
        assert_holds(cache, range(stopped))
    assert_holds(write(folder, range(stopped + 9)), range(stopped + 9))  # the lock died with its owner


def test_two_writers_do_not_meet(tmp_path):
    with CacheWriter(tmp_path, HEADER), pytest.raises(CacheError, match="another process is writing"):
        CacheWriter(tmp_path, HEADER).__enter__()
    write(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the kernel's always full device")
def test_full_disk_leaves_the_complete_part(tmp_path):
    def numbers():
        for number in range(99):
            full = tmp_path / "shard-00002.safetensors.tmp"
            if (tmp_path / "shard-00001.safetensors").exists() and not full.is_symlink():
                full.symlink_to("/dev/full")
            yield number

    with pytest.raises(DiskFullError, match="6 examples") as caught:
        write(tmp_path, numbers())
    assert caught.value.errno == errno.ENOSPC
    cache = TeacherCache(tmp_path)
    assert_holds(cache, range(6))
    assert not cache.complete
    shards = [f"shard-0000{i}.safetensors" for i in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json", *shards]
    assert_holds(write(tmp_path), range(12))


def test_what_does_not_fit_is_not_started(tmp_path, monkeypatch):
    with CacheWriter(tmp_path, HEADER) as writer:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        writer.require_space(3000, 100)
        with pytest.raises(DiskFullError, match="100,000 are free"):
            writer.require_space(6000, 100)


def test_space_that_is_asked_for_suffices(tmp_path, monkeypatch):
    write(tmp_path, range(40))
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    tokens = TeacherCache(tmp_path).num_tokens
    usage = shutil.disk_usage(tmp_path)
    with CacheWriter(tmp_path / "other", HEADER, shard_bytes=200) as writer:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written - 1))
        with pytest.raises(DiskFullError):
            writer.require_space(tokens, 40)


def test_other_errors_of_the_disk_pass_through(tmp_path):
    with CacheWriter(tmp_path, HEADER, shard_bytes=10**6) as writer:
        add(writer, range(3))
        (tmp_path / "shard-00000.safetensors.tmp").mkdir()
        with pytest.raises(IsADirectoryError):
            writer._flush()
        (tmp_path / "shard-00000.safetensors.tmp").rmdir()
    assert_holds(TeacherCache(tmp_path), range(3))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_every_damaged_byte_is_noticed(tmp_path):
    cache = write(tmp_path / "cache", range(3), shard_bytes=10**6)
    path = cache.folder / "shard-00000.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(CacheError, match=r"shard-00000\.safetensors is damaged"):
            TeacherCache(cache.folder).read([key(n) for n in range(3)])
        path.write_bytes(whole)
    assert_holds(TeacherCache(cache.folder), range(3))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_shards_are_refused(tmp_path, length):
    path = write(tmp_path).folder / "shard-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, length % size)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is damaged"):
        TeacherCache(tmp_path)
    with pytest.raises(CacheError, match="damaged"):
        write(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match="the file is missing"):
        TeacherCache(tmp_path)


def test_shards_of_another_cache_are_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", header=replace(HEADER, weights="x" * 64))
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", tmp_path / "a")
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is damaged"):
        TeacherCache(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "llm_kd.teacher_cache/1"}', b"\xff\xfe", "null", '{"shards": [{"file": 1}]}'],
)
def test_damaged_manifests_are_refused(tmp_path, content):
    write(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        TeacherCache(tmp_path)


def test_manifests_of_other_formats_and_none(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("teacher_cache/1", "teacher_cache/9"))
    with pytest.raises(CacheError, match=r"llm_kd\.teacher_cache/9"):
        TeacherCache(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=r"manifest\.json"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "x" * 64), ("tokenizer", "x"), ("vocab_size", 299), ("size", 3), ("dtype", "bfloat16")],
)
def test_a_foreign_cache_is_not_written_to(tmp_path, name, value):
    before = write(tmp_path)
    with pytest.raises(CacheError, match=f"another cache .*{name}: .*{value}"):
        write(tmp_path, range(20), header=replace(HEADER, **{name: value}))
    assert_holds(TeacherCache(tmp_path), range(12))
    assert TeacherCache(tmp_path).complete
    assert len(write(tmp_path, range(20), header=replace(HEADER, teacher="renamed"))) == 20
    before.check(weights=HEADER.weights, tokenizer=HEADER.tokenizer, vocab_size=V)
    before.check()
    if name not in ("size", "dtype"):
        with pytest.raises(CacheError, match=f"another teacher .*{name}: .*{value}"):
            before.check(**{name: value})


def test_missing_examples(tmp_path):
    cache = write(tmp_path)
    with pytest.raises(CacheError, match=key(12)):
        cache.read([key(0), key(12)])


def test_bad_additions(tmp_path):
    with CacheWriter(tmp_path, HEADER) as writer:
        name, tokens, rows = example(0)
        writer.add([name], [3], tokens, rows)
        with pytest.raises(ValueError, match="stored once only"):
            writer.add([name], [3], tokens, rows)
        with pytest.raises(ValueError, match="stored once only"):
            writer.add([key(1), key(1)], [1, 2], tokens, rows)
        with pytest.raises(ValueError, match="4 of 300 tokens"):
            writer.add([key(1)], [3], tokens, TruncatedDistribution.from_logits(torch.randn(3, V), 2))
    assert_holds(TeacherCache(tmp_path), [0])
    with pytest.raises(ValueError, match="shard_bytes"):
        CacheWriter(tmp_path, HEADER, shard_bytes=0)
