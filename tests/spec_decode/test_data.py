"""The target's text and its stored features: what they hold, and what a kill or a full disk does."""

import copy
import json
import os
import shutil

import pytest
import torch
from filelock import FileLock, Timeout

from kd_common.hub import load_tokenizer
from kd_common.text import Message, Row
from spec_decode.data import features as features_module
from spec_decode.data.corpus import (
    as_samples,
    corpus,
    encode_answers,
    encode_prompts,
    write_corpus,
)
from spec_decode.data.datamodule import Sequences, StreamSampler, TargetText, collate
from spec_decode.data.features import FeatureStore, split_states
from spec_decode.data.prompts import read_asked, read_prompts
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.models import CausalLM

PROMPTS = [[5, 7, 9], [1, 2], [3, 8, 3, 8], [11], [12, 13]]
SAMPLING = Sampling(0.0, max_new_tokens=8)


def answers_of(path):
    return [asked.answer for asked in read_asked(path, answered=True)]


def write(tiny, folder, prompts=PROMPTS, sampling=SAMPLING, stops=(6,)):
    cache = corpus(folder, tiny.target, prompts, sampling, stops=stops, seed=0, batch_size=2)
    return cache, write_corpus(cache, tiny.target, sampling, stops=stops, seed=0, progress=False)


# --- text ---


def test_the_text_is_the_targets_own(tiny, tmp_path):
    cache, samples = write(tiny, tmp_path)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert sample.tokens[: sample.answer_start] == prompt
        expected = tiny.plain(tiny.model, prompt, Sampling(0.0), row_seeds(0, 1)[0], 8, (6,))
        assert sample.tokens[sample.answer_start :] == expected
    assert as_samples(PROMPTS, cache.read()) == samples


def test_a_killed_writer_draws_what_it_would_have_drawn(tiny, tmp_path):
    sampled = Sampling(1.0, max_new_tokens=8)
    cache, samples = write(tiny, tmp_path, sampling=sampled)
    lines = cache.path.read_bytes().splitlines(keepends=True)
    cache.path.with_suffix(".partial").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    cache.path.unlink()
    assert write(tiny, tmp_path, sampling=sampled)[1] == samples


def test_other_settings_are_another_file(tiny, tmp_path):
    drawn = {"sampling": SAMPLING, "stops": (6,), "seed": 0, "batch_size": 2}
    other = {"sampling": Sampling(0.0, max_new_tokens=9), "stops": (7,), "seed": 1, "batch_size": 3}
    paths = {corpus(tmp_path, tiny.target, PROMPTS, **drawn | {name: value}).path for name, value in other.items()}
    paths |= {corpus(tmp_path, tiny.target, prompts, **drawn).path for prompts in (PROMPTS, PROMPTS[:4])}
    assert len(paths) == 6


def test_prompts_become_turns_of_the_chat_template(byte_tokenizer):
    def text(prompts, **settings):
        return [byte_tokenizer.decode(ids) for ids in encode_prompts(byte_tokenizer, prompts, **settings)]

    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert text(["abc", "de"], longest=99) == [f"<|im_start|>user\nabc{end}", f"<|im_start|>user\nde{end}"]
    own = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    assert text(["abc"], longest=99, chat_template=own) == ["user: abc"]
    with pytest.raises(ValueError, match="no prompt has 1 to 1 tokens"):
        encode_prompts(byte_tokenizer, ["abc"], longest=1)


def test_prompt_files(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "a"},
        {"turns": ["b", "later"]},
        {"instruction": "c", "input": "d"},
        {"instruction": "e", "input": ""},
        {"question": "f"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "g"}]},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "i"}]},
        {"data": ["j", "k", "l", "m"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "n"}, {"type": "text", "text": "o"}]}]},
        {"prompt": [{"role": "user", "content": "p"}], "answer": "q"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    asked = read_asked(path)
    turns = [[(m.role, m.content + (f"+{m.input}" if m.input else "")) for m in one.prompt.messages] for one in asked]
    alone = ["a", "b", "c+d", "e", "f", None, "h", "j", "no", "p"]
    expected = [[("user", text)] if text else [("system", "s"), ("user", "g")] for text in alone]
    assert turns == expected
    assert [one.prompt for one in asked] == read_prompts(path)
    assert [one.prompt.source for one in asked][-1] == f"{path}, line 10"
    assert [one.answer and one.answer.message.content for one in asked] == [None] * 6 + ["i", "k", None, "q"]
    assert [one.later for one in asked] == [0, 1, 0, 0, 0, 0, 0, 2, 0, 0]
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "needs prompt, .* has text"),
        ({"prompt": 3}, "must be text, is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"prompt": "a", "output_token_ids": "12"}, "output_token_ids must be a list of token ids"),
        ({"prompt": "a", "images": ["x.png"]}, "has 'images': only text can be read"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "turn 2 is empty"),
        ({"prompt": "half \ud83d"}, r"holds half of a character \(U\+D83D"),
    ],
)
def test_bad_prompts_are_counted_and_named(tmp_path, record, problem):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "fine"}, record, record])))
    with pytest.raises(ValueError, match=rf"(?s)p.jsonl: 2 of 3 rows are malformed.* line 2: .*{problem}.* line 3: "):
        read_prompts(path)


CHAT = [("assistant", "hello"), ("user", "d"), ("assistant", "x" * 150), ("user", "e"), ("assistant", "y")]


def test_answers_written_elsewhere(tmp_path, tiny, standin):
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "a", "answer": "one"},
        {"turns": ["b"], "response": "two"},
        {"instruction": "c" * 300, "output": "its prompt is too long"},
        {"messages": [{"role": r, "content": c} for r, c in CHAT]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [answer.message.content for answer in answers_of(path)] == [
        "one",
        "two",
        "its prompt is too long",
        "x" * 150,
    ]
    how = {"features": "online", "val_prompts": 1, "max_length": 130, "batch_size": 2}
    data = TargetText(str(path), answers="file", sampling=Sampling(0.0, max_new_tokens=12), **how)
    tokenizer = load_tokenizer(str(standin))
    data.attach(
        CausalLM.from_transformers(tiny.make(vocab_size=258, max_position_embeddings=256)),
        tokenizer,
        (tokenizer.eos_token_id, 7),
    )
    data.prepare_data()
    data.setup()
    texts = [tokenizer.decode(s.tokens[s.answer_start :]) for s in data.samples]
    assert texts[:2] == [f"one{tokenizer.eos_token}", f"two{tokenizer.eos_token}"]
    assert texts[2] == "x" * (130 - data.samples[2].answer_start)  # cut, so without its end
    assert data.held_out == [data.samples[2].tokens[: data.samples[2].answer_start]]
    assert int(data.token_counts().sum()) == 8
    path.write_text('{"prompt": "a", "answer": "one"}\n{"prompt": "b"}')
    with pytest.raises(ValueError, match=r"line 2: needs for data\.answers file an answer"):
        TargetText(str(path), answers="file", val_prompts=1)
    with pytest.raises(ValueError, match=r"set data\.prompts"):
        TargetText(answers="file")


def answered(tmp_path, tokenizer, *lines, longest=99):
    """Texts of the answers of a file, as they are learnt."""
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    samples = encode_answers(tokenizer, read_prompts(path), answers_of(path), longest=longest, max_length=200)
    return [tokenizer.decode(sample.tokens[sample.answer_start :]) for sample in samples]


def test_tokens_that_a_server_wrote_are_taken_and_cut_answers_get_no_end(tmp_path, byte_tokenizer):
    ids = byte_tokenizer("two<|im_end|>", add_special_tokens=False).input_ids
    assert answered(
        tmp_path,
        byte_tokenizer,
        {"prompt": "a", "answer": "one", "finish_reason": "stop"},
        {"prompt": "a", "answer": "on", "finish_reason": "length"},
        {"prompt": "a", "answer": "two", "output_token_ids": ids},
        {"prompt": "a", "output_token_ids": ids[:2], "finish_reason": "length"},
        {"prompt": "a", "completion": "thr", "stop_reason": "max_tokens"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "four"}]},
    ) == ["one<|im_end|>", "on", "two<|im_end|>", "tw", "thr", "four<|im_end|>"]
    with pytest.raises(ValueError, match=r"line 1: output_token_ids read 'two' .* the answer beside them 'three'"):
        answered(tmp_path, byte_tokenizer, {"prompt": "a", "answer": "three", "output_token_ids": ids})
    with pytest.raises(ValueError, match=r"line 1: output_token_ids must lie in \[0, 258\)"):
        answered(tmp_path, byte_tokenizer, {"prompt": "a", "output_token_ids": [999]})


def test_prompts_equal_those_of_llm_kd(byte_tokenizer):
    encode = pytest.importorskip("llm_kd.data").Encoder(byte_tokenizer).prompt
    row = Row((Message("system", "Be <|im_end|> brief."), Message("user", "Hi <|im_start|>")), "line 1")
    [ids] = encode_prompts(byte_tokenizer, [row], longest=99)
    assert ids == encode(row)
    assert ids.count(byte_tokenizer.eos_token_id) == 2  # those of the template alone
    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    [ids] = encode_prompts(plain, ["Hi"], longest=99)
    assert plain.decode(ids) == "### Instruction:\nHi\n\n### Response:\n"


# --- features ---


@pytest.fixture
def texts(tiny):
    return [torch.randint(40, (n,)).tolist() for n in (9, 4, 12, 7, 5)]


def test_stored_states_are_the_targets_rounded(tiny, texts, tmp_path):
    store = FeatureStore(tmp_path / "f", texts, 32)
    store.write(tiny.target, batch_size=2, progress=False)
    assert (tmp_path / "f/features.bin").stat().st_size == store.size == 37 * 4 * 32 * 2
    for index, text in enumerate(texts):
        states = tiny.target(torch.tensor([text]))
        found = split_states(store.read(index))
        torch.testing.assert_close(found.features.float(), states.features[0], rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(found.final.float(), states.final[0], rtol=2**-8, atol=1e-5)


def test_a_killed_feature_writer_goes_on(tiny, texts, tmp_path, monkeypatch):
    whole = FeatureStore(tmp_path / "whole", texts, 32)
    whole.write(tiny.target, batch_size=2, progress=False)
    store = FeatureStore(tmp_path / "f", texts, 32)
    calls = []

    class Dying:
        device = tiny.target.device

        def __call__(self, tokens):
            calls.append(len(tokens))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return tiny.target(tokens)

    with pytest.raises(KeyboardInterrupt):
        store.write(Dying(), batch_size=2, progress=False)
    assert store.done == 2
    begun = (tmp_path / "f/progress.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match="not complete: 2 sequences"):
        store.read(0)
    # What was being written is garbage; it is written again.
    with (tmp_path / "f/features.bin").open("r+b") as file:
        third = sorted(range(len(texts)), key=lambda i: -len(texts[i]))[2]  # longest first
        file.seek(int(store.starts[third]) * store.width * 2)
        file.write(b"\xff" * 64)
    with (tmp_path / "f/progress.jsonl").open("ab") as file:
        file.write(b'{"checksums": [12')
    store.write(Dying(), batch_size=2, progress=False)
    assert calls == [2, 2, 2, 1]
    assert (tmp_path / "f/features.bin").read_bytes() == (tmp_path / "whole/features.bin").read_bytes()
    # Lines are appended: writing all of them again after every batch would take a time that grows with the square.
    progress = (tmp_path / "f/progress.jsonl").read_bytes()
    assert progress == (tmp_path / "whole/progress.jsonl").read_bytes()
    assert progress.startswith(begun)
    assert progress.count(b"\n") == 3


def test_a_full_disk_is_refused_before_anything_is_written(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 4000))
    store = FeatureStore(tmp_path / "f", texts, 32)
    with pytest.raises(ValueError, match=r"needs 0\.00 GB more .* set data.features to online"):
        store.write(tiny.target, progress=False)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("size", [0, 100, None])
def test_a_store_that_lost_its_states_is_refused_and_not_filled_with_zeros(tiny, texts, tmp_path, size):
    store = FeatureStore(tmp_path / "f", texts, 32)
    store.write(tiny.target, batch_size=2, progress=False)
    progress, data = tmp_path / "f/progress.jsonl", tmp_path / "f/features.bin"
    progress.write_bytes(progress.read_bytes().splitlines(keepends=True)[0])
    data.unlink() if size is None else os.truncate(data, size)
    with pytest.raises(ValueError, match=rf"{data} is damaged: {size or 0} bytes instead of {store.size}; delete"):
        store.write(tiny.target, progress=False)


# --- batches ---


def test_collate_pads_and_marks_answers(tiny, texts, tmp_path):
    _, samples = write(tiny, tmp_path)
    store = FeatureStore(tmp_path / "f", [s.tokens for s in samples], 32)
    store.write(tiny.target, progress=False)
    data = Sequences(samples, store)
    batch = collate([data[0], data[2]])
    for row, sample in enumerate((samples[0], samples[2])):
        length = len(sample.tokens)
        assert batch.tokens[row, :length].tolist() == sample.tokens
        assert batch.answer[row].nonzero().flatten().tolist() == list(range(sample.answer_start, length))
        assert torch.equal(batch.states.final[row, :length], split_states(store.read([0, 2][row])).final)
    assert collate([Sequences(samples, None)[1]]).states is None


def test_the_stream_shows_every_sample_equally_often_and_shares_it_out():
    epochs = []
    for epoch in range(7):  # seven epochs of ten rows are ten passes over seven samples
        shares = []
        for rank in range(2):
            sampler = StreamSampler([5] * 7, 2, 10, seed=3, rank=rank, ranks=2)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler) == 5
        single = StreamSampler([5] * 7, 2, 10, seed=3, rank=0, ranks=1)
        single.set_epoch(epoch)
        assert [x for pair in zip(*shares, strict=True) for x in pair] == list(single)
        epochs += list(single)
    assert torch.tensor(epochs).bincount().tolist() == [10] * 7
    for start in range(0, 70, 7):
        assert sorted(epochs[start : start + 7]) == list(range(7))
    assert epochs[:7] != epochs[7:14]


def test_batches_hold_samples_of_about_equal_length():
    lengths = torch.randint(10, 500, (259,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(StreamSampler(lengths, 4, 256, seed=0, rank=0, ranks=1))
    batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 256, 4)]
    padded, shuffled = sum(4 * max(b) for b in batches), sum(4 * max(lengths[at : at + 4]) for at in range(0, 256, 4))
    assert padded < 1.1 * sum(map(sum, batches)) < 1.2 * sum(lengths) < shuffled
    assert [max(b) for b in batches[:8]] != sorted(max(b) for b in batches[:8])  # but not in order of length


def test_machines_that_share_a_cache_write_one_after_the_other(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    data = TargetText(limit=20, val_prompts=2, sampling=SAMPLING, generation_batch_size=2, max_length=64)
    monkeypatch.setattr(data, "encoded", PROMPTS)
    monkeypatch.setattr(data, "_target", [tiny.target])

    def locked(store, *args, **kwargs):
        with pytest.raises(Timeout), FileLock(f"{store.folder}.lock", timeout=0):
            pass
        return write_features(store, *args, **kwargs)

    write_features = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", locked)
    data.progress = False
    data.prepare_data()
    assert [s.tokens[: s.answer_start] for s in data.samples] == PROMPTS
    assert data._store().done == len(PROMPTS)


def test_a_cache_that_holds_everything_is_not_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    samples = []
    for again in (False, True):
        data = TargetText(limit=20, val_prompts=2, sampling=SAMPLING, generation_batch_size=2, max_length=64)
        monkeypatch.setattr(data, "encoded", PROMPTS)
        monkeypatch.setattr(data, "_target", [tiny.target])
        data.progress = False
        if again:  # as on a medium that can only be read
            monkeypatch.setattr("kd_common.files.FileLock", None)
        data.prepare_data()
        data.setup()
        samples.append(data.samples)
    assert samples[0] == samples[1]
    data._corpus.path.unlink()
    with pytest.raises(TypeError):
        data.prepare_data()  # what is missing is written under the lock


def test_a_datamodule_without_a_target_says_so():
    with pytest.raises(ValueError, match="no target is attached"):
        TargetText(limit=20).prepare_data()
