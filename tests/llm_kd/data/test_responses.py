"""Responses on disk: written once, continued after a kill, refused when damaged."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tokenizers import decoders

from kd_common.files import cache_root
from llm_kd.data import responses as module
from llm_kd.data.responses import ResponsesError, responses_path, write_responses
from llm_kd.models.fingerprint import tensors_fingerprint
from llm_kd.models.generation import Sampling, generate

PROMPTS = [[10 + i] * (1 + i % 4) for i in range(11)]
SAMPLING = Sampling(max_new_tokens=5)


@pytest.fixture
def write(text, teacher):
    tokenizer = text.tokenizer()

    def write(
        model=teacher, prompts=PROMPTS, sampling=SAMPLING, eos_ids=(1,), seed=0, batch_size=4, tokenizer=tokenizer
    ):
        return write_responses(
            model,
            prompts,
            sampling,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            pad_id=1,
            seed=seed,
            batch_size=batch_size,
            progress_bar=False,
        )

    return write


@pytest.fixture
def files():
    """Files of responses in the cache, without locks."""
    folder = cache_root() / "responses"
    return lambda: sorted(path for path in folder.glob("*") if path.suffix != ".lock")


@pytest.fixture
def no_generation(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the teacher was asked again")

    return lambda: monkeypatch.setattr(module, "generate", forbidden)


def test_responses_stand_in_the_order_of_the_prompts(write, text, teacher):
    greedy = Sampling(max_new_tokens=5, temperature=0)
    tokenizer = text.tokenizer()
    alone = [generate(teacher, [p], greedy, eos_ids=(1,), pad_id=1, seed=0, batch_size=1)[0] for p in PROMPTS]
    found = write(sampling=greedy)
    assert [response.tokens for response in found] == alone
    assert [r.text for r in found] == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    assert len({tuple(tokens) for tokens in alone}) > 3


def test_they_are_written_once(write, files, no_generation):
    first = write()
    (path,) = files()
    assert path.suffix == ".jsonl"
    assert len(path.read_text().splitlines()) == len(PROMPTS)
    no_generation()
    assert write() == first


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": PROMPTS[1:]},
        {"prompts": PROMPTS[::-1]},
        {"sampling": Sampling(max_new_tokens=5, top_k=2)},
        {"seed": 1},
        {"eos_ids": (1, 2)},
    ],
)
def test_whatever_determines_them_has_its_own_file(write, files, changed):
    write()
    write(**changed)
    assert len(files()) == 2


def test_only_new_prompts_are_answered(write, files, monkeypatch):
    first = write()
    asked = []
    monkeypatch.setattr(module, "generate", lambda m, p, *a, **k: asked.extend(p) or generate(m, p, *a, **k))
    new = [[30, 31], [32]]
    again = write(prompts=[*PROMPTS[::-1], *new, PROMPTS[0]])
    assert again[: len(PROMPTS)] == first[::-1]
    assert sorted(asked) == sorted([*new, PROMPTS[0]])  # one that occurs once more is drawn once more
    assert len(files()) == 2
    asked.clear()
    write(seed=1)
    write(sampling=Sampling(max_new_tokens=6))
    assert len(asked) == 2 * len(PROMPTS)
    files()[0].write_bytes(b"{}\n")
    with pytest.raises(ResponsesError, match=r"line 1: damaged .* delete it"):
        [write(prompts=[[40]], **how) for how in ({}, {"seed": 1}, {"sampling": Sampling(max_new_tokens=6)})]


def change_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def change_the_configuration(model):
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [change_a_weight, change_the_configuration])
def test_another_model_has_its_own_file(write, files, teacher, change):
    write()
    change(teacher)
    write()
    assert len(files()) == 2


def test_ends_that_the_model_names_are_ends(write, files, teacher):
    free = write(sampling=Sampling(max_new_tokens=5, temperature=0))
    end = free[0].tokens[1]
    teacher.generation_config.eos_token_id = [end]
    ended = write(sampling=Sampling(max_new_tokens=5, temperature=0))
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(end) + 1]
    assert len(files()) == 2


def test_the_text_is_that_of_the_tokenizer_at_hand(write, text):
    first = write()
    tokenizer = text.tokenizer()
    tokenizer._tokenizer.decoder = decoders.Sequence([tokenizer._tokenizer.decoder, decoders.Replace("a", "A")])
    again = write(tokenizer=tokenizer)
    assert [response.tokens for response in again] == [response.tokens for response in first]
    texts = [tokenizer.decode(response.tokens, skip_special_tokens=True) for response in first]
    assert [response.text for response in again] == texts


def test_a_fingerprint_depends_on_names_shapes_precisions_and_values():
    a = torch.arange(6.0)
    variants = [{"x": a}, {"y": a}, {"x": a.view(2, 3)}, {"x": a.double()}, {"x": -a}, {"x": a, "y": a}]
    made = [*map(tensors_fingerprint, variants), tensors_fingerprint({"x": a}, "note")]
    assert len(set(made)) == len(made)
    assert tensors_fingerprint({"x": a, "none": None}) == tensors_fingerprint({"x": a.clone()})
    # scalars, bfloat16 and transposed tensors, too
    odd = [{"x": a.bfloat16()}, {"x": torch.tensor(3)}, {"x": torch.tensor(4)}, {"x": a.view(2, 3).T}]
    assert len(set(map(tensors_fingerprint, odd))) == 4


@pytest.mark.parametrize("torn", [0, 1, 10, 10_000])
@pytest.mark.parametrize("whole", [0, 3, 4, 9, 11])
def test_an_interrupted_file_is_continued(write, files, tmp_path, whole, torn):
    expected = write()
    (path,) = files()
    lines = path.read_bytes().splitlines(keepends=True)
    rest = b"".join(lines[whole:])[:torn].rpartition(b"\n")[2]  # at most a part of one line
    path.with_suffix(".partial").write_bytes(b"".join(lines[:whole]) + rest)
    path.unlink()
    assert write() == expected
    assert path.read_bytes() == b"".join(lines)
    assert files() == [path]


def test_what_was_written_is_not_generated_again(write, files, monkeypatch):
    write()
    (path,) = files()
    lines = path.read_bytes().splitlines(keepends=True)
    path.with_suffix(".partial").write_bytes(b"".join(lines[:9]))
    path.unlink()
    asked = []
    monkeypatch.setattr(module, "generate", lambda m, p, *a, **k: asked.append(len(p)) or generate(m, p, *a, **k))
    write()
    assert asked == [3]  # 8 of the 9 lines are whole batches


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], b"{torn\n", *lines[3:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [b'{"prompt": 3}\n', *lines[1:]],
        lambda lines: [b"7\n", *lines[1:]],
    ],
)
def test_a_damaged_file_is_refused(write, files, damage):
    write()
    (path,) = files()
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ResponsesError, match=rf"{path}.*delete it to write it again"):
        write()


def test_a_damaged_partial_file_is_refused(write, files):
    write()
    (path,) = files()
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join([b"{}\n", *path.read_bytes().splitlines(keepends=True)[1:4]]))
    path.unlink()
    with pytest.raises(ResponsesError, match=rf"{partial}, line 1: damaged .*; delete it"):
        write()


def test_lines_are_readable(write, files):
    write()
    (path,) = files()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {tuple(record) for record in records} == {("prompt", "asked", "tokens", "text", "crc32")}
    assert sorted(record["prompt"] for record in records) == list(range(len(PROMPTS)))


def test_one_writes_while_others_wait(write, files, monkeypatch):
    calls = []

    def slow(*args, **settings):
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return generate(*args, **settings)

    monkeypatch.setattr(module, "generate", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(write())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(set(calls)) == 1
    assert len(calls) == 3


def test_the_path_names_the_model(teacher):
    teacher.config._name_or_path = "owner/some-model"
    path = responses_path(teacher, PROMPTS, SAMPLING, eos_ids=(1,), vocab_size=9, seed=0)
    assert path.name.startswith("some-model-")


VICTIM = """
import sys, time
import torch
from llm_kd.data import responses
from llm_kd.models.generation import Sampling
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

folder, prompts, slow = sys.argv[1], eval(sys.argv[2]), float(sys.argv[3])
plain = responses.generate
responses.generate = lambda *a, **k: (time.sleep(slow), plain(*a, **k))[1]
responses.write_responses(
    LlamaForCausalLM.from_pretrained(folder), prompts, Sampling(max_new_tokens=5),
    tokenizer=PreTrainedTokenizerFast.from_pretrained(folder), eos_ids=(1,), pad_id=1, seed=0, batch_size=1,
)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_is_continued(write, files, tmp_path, text, teacher):
    expected = write(batch_size=1)
    (path,) = files()
    content = path.read_bytes()
    path.unlink()
    teacher.save_pretrained(tmp_path / "model")
    text.tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "model"), repr(PROMPTS), "0.5"]
    victim = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    partial, deadline = path.with_suffix(".partial"), time.monotonic() + 500
    while not partial.is_file() or partial.read_bytes().count(b"\n") < 3:
        assert victim.poll() is None, victim.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    victim.stderr.close()
    assert 3 <= partial.read_bytes().count(b"\n") < len(PROMPTS)
    assert write(batch_size=1) == expected
    assert path.read_bytes() == content
