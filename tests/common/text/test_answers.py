"""Answers on disk: written once, in whole batches, continued after a kill, refused when damaged."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kd_common.text import AnswerCache

PROMPTS = [[10 + i] * (1 + i % 4) for i in range(11)]
ORDER = [3, 7, 2, 6, 10, 1, 5, 9, 0, 4, 8]  # longest first


def cache(folder, prompts=PROMPTS, batch_size=4, **settings):
    return AnswerCache(folder, "model", {"seed": 0} | settings, prompts, batch_size)


class Model:
    """An answer is the prompt's first token, the start of its batch, and its place among those asked."""

    def __init__(self, seconds=0.0):
        self.asked, self.seconds = [], seconds

    def __call__(self, prompts, start):
        time.sleep(self.seconds)
        self.asked.append(prompts)
        return [[prompt[0], start, place] for place, prompt in enumerate(prompts)]


def write(found, model=None, **settings):
    return found.write(model or Model(), "the answers", progress=False, **settings)


def test_answers_stand_in_the_order_of_the_prompts_and_are_asked_for_longest_first(tmp_path):
    model, found = Model(), cache(tmp_path)
    assert found.read() is None
    answers = write(found, model)
    assert [answer[0] for answer in answers] == [prompt[0] for prompt in PROMPTS]
    assert [prompt for batch in model.asked for prompt in batch] == [PROMPTS[number] for number in ORDER]
    assert [answers[number][1:] for number in ORDER] == [[place // 4 * 4, place % 4] for place in range(11)]
    assert write(found, None) == found.read() == answers
    assert len(model.asked) == 3


@pytest.mark.parametrize("changed", [{"prompts": PROMPTS[1:]}, {"prompts": PROMPTS[::-1]}, {"seed": 1}])
def test_whatever_determines_them_has_its_own_file(tmp_path, changed):
    assert cache(tmp_path, **changed).path != cache(tmp_path).path


def test_lines_are_readable(tmp_path):
    found = cache(tmp_path)
    write(found, decode=str)
    records = [json.loads(line) for line in found.path.read_text().splitlines()]
    assert {tuple(record) for record in records} == {("prompt", "asked", "tokens", "text", "crc32")}
    assert [record["prompt"] for record in records] == ORDER


def test_only_new_prompts_are_answered_where_that_is_wanted(tmp_path):
    first, model, new = write(cache(tmp_path)), Model(), [[30, 31], [32]]
    prompts = [*PROMPTS[::-1], *new, PROMPTS[0]]
    again = write(cache(tmp_path, prompts), model, reuse=True)
    assert again[: len(PROMPTS)] == first[::-1]
    # One that occurs once more is drawn once more.
    assert sorted(prompt for batch in model.asked for prompt in batch) == sorted([*new, PROMPTS[0]])
    for other, settings in ((cache(tmp_path, [*PROMPTS, [9]]), {}), (cache(tmp_path, seed=1), {"reuse": True})):
        model = Model()
        write(other, model, **settings)
        assert sum(map(len, model.asked)) == len(other.prompts)


@pytest.mark.parametrize("torn", [0, 1, 10, 10_000])
@pytest.mark.parametrize("whole", [0, 3, 4, 9, 11])
def test_an_interrupted_file_is_continued_behind_its_whole_batches(tmp_path, whole, torn):
    found, model = cache(tmp_path), Model()
    expected = write(found)
    lines = found.path.read_bytes().splitlines(keepends=True)
    rest = b"".join(lines[whole:])[:torn].rpartition(b"\n")[2]  # at most a part of one line
    found.path.with_suffix(".partial").write_bytes(b"".join(lines[:whole]) + rest)
    found.path.unlink()
    assert write(found, model) == expected
    assert found.path.read_bytes() == b"".join(lines)
    assert sum(map(len, model.asked)) == (0 if whole == 11 else 11 - whole // 4 * 4)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".jsonl", ".lock"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], b"{torn\n", *lines[3:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [b'{"prompt": 3}\n', *lines[1:]],
        lambda lines: [b"7\n", *lines[1:]],
        lambda lines: [lines[0].replace(b"[13,", b"[14,"), *lines[1:]],
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    found = cache(tmp_path)
    write(found)
    found.path.write_bytes(b"".join(damage(found.path.read_bytes().splitlines(keepends=True))))
    for read in (found.read, lambda: write(found)):
        with pytest.raises(ValueError, match=rf"{found.path}.*delete it"):
            read()


def test_a_damaged_partial_file_and_one_that_is_reused_are_refused(tmp_path):
    found = cache(tmp_path)
    write(found)
    damaged = b"".join([b"{}\n", *found.path.read_bytes().splitlines(keepends=True)[1:4]])
    found.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{found.path}, line 1: damaged .*delete it"):
        write(cache(tmp_path, [[40]]), reuse=True)
    partial = found.path.rename(found.path.with_suffix(".partial"))
    with pytest.raises(ValueError, match=rf"{partial}, line 1: damaged .*delete it"):
        write(found)


def test_one_writes_while_others_wait(tmp_path):
    model, answers = Model(seconds=0.05), []
    threads = [threading.Thread(target=lambda: answers.append(write(cache(tmp_path), model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1]
    assert len(model.asked) == 3


VICTIM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_answers import Model, cache, write
write(cache(Path(sys.argv[2]), batch_size=1), Model(seconds=0.2))
"""


def test_a_killed_process_is_continued(tmp_path):
    found = cache(tmp_path / "whole", batch_size=1)
    expected, killed = write(found), cache(tmp_path / "killed", batch_size=1)
    here = os.path.dirname(__file__)
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, here, str(killed.folder)], stderr=subprocess.PIPE)
    partial, deadline = killed.path.with_suffix(".partial"), time.monotonic() + 100
    while not partial.is_file() or partial.read_bytes().count(b"\n") < 3:
        assert victim.poll() is None, victim.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    victim.stderr.close()
    assert 3 <= partial.read_bytes().count(b"\n") < len(PROMPTS)
    assert write(killed) == expected
    assert killed.path.read_bytes() == found.path.read_bytes()
