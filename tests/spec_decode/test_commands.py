"""Generate, chat and benchmark on a stand-in; text that streams."""

import copy
import io
import itertools
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from kd_common.hub import load_causal_lm
from spec_decode.benchmark import benchmark, checksum, content_digest, read_results
from spec_decode.chat import chat, talk
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import first_divergence, margin
from spec_decode.decoding.peers import transformers_peers
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.session import Session, TextStream, find_drafter, parse_tree
from spec_decode.drafters import DynamicTree, FastEagle, PromptLookup, WithLookup, save_drafter
from spec_decode.generate import GREEN, generate
from spec_decode.models.target import TargetSpec
from spec_decode.viz.tables import print_tables


@pytest.fixture
def drafter(standin, tmp_path):
    """Folder of a FastEagle drafter with a measured acceptance."""
    target = TargetSpec(str(standin), "float32").load()
    made = FastEagle(depth=2).bind(target)
    made.acceptance = [[0.1, 0.1], [0.1, 0.1]]
    save_drafter(made, tmp_path / "drafter", {"target": str(standin)})
    return str(tmp_path / "drafter")


def test_generate_streams_the_plain_text(standin, drafter, capsys):
    shared = {"prompt": "Hello", "max_new_tokens": 20, "dtype": "float32", "target": str(standin)}
    plain = generate(drafter="none", **shared)
    printed = capsys.readouterr().out
    trees = [(drafter, "chain"), (drafter, "2,1"), (drafter, "auto"), ("PromptLookup", "1,1,1")]
    for name, tree in [*trees, (f"{drafter}+lookup", "2,1")]:
        out = generate(drafter=name, tree=tree, **shared)
        assert torch.equal(out.sequences, plain.sequences)
        # All but the closing line, whose times differ.
        assert capsys.readouterr().out.rsplit("\n", 2)[0] == printed.rsplit("\n", 2)[0]
    assert "tau 1.00 (accepted + 1 per target pass)" in printed
    for name in (drafter, f"{drafter}+lookup"):  # the target is the one it was trained for
        generate(drafter=name, **(shared | {"target": None}))


@pytest.mark.parametrize("drafter", ["none", "PromptLookup"])
def test_a_session_stops_where_transformers_does(standin, tmp_path, drafter):
    """The end that only generation_config.json names."""
    folder = shutil.copytree(standin, tmp_path / "target")
    prompt = [5, 6, 7, 5, 6, 7]
    free = Session.open("none", str(folder), dtype="float32", device="cpu", tree="chain")
    written = free.decoder.generate([prompt], max_new_tokens=12, temperature=0.0).new_tokens[0]
    end = next(token for place, token in enumerate(written) if place > 2 and token not in written[:place])
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [end]}))
    model = load_causal_lm(str(folder))
    ids = torch.tensor([prompt])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    session = Session.open(drafter, str(folder), dtype="float32", device="cpu", tree="chain")
    out = session.decoder.generate([prompt], max_new_tokens=12, temperature=0.0, stop_tokens=session.stops)
    assert list(out.new_tokens[0]) == theirs[0, len(prompt) :].tolist() == list(written[: written.index(end) + 1])


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="--prompt is empty"):
        generate("  ")


def test_drafted_tokens_can_be_coloured(standin, capsys):
    generate(
        "aaaaaaaaaaaa", drafter="PromptLookup", target=str(standin), max_new_tokens=60, dtype="float32", color=True
    )
    printed = capsys.readouterr().out
    assert ("tau 1.00" in printed) == (GREEN not in printed)


def test_chat_remembers_and_refuses_what_does_not_fit(standin):
    session = Session.open("PromptLookup", str(standin), dtype="float32", device="cpu", tree="chain")
    said, out = iter(["hi", "", "again", "/new", "x" * 3000, "fresh", "/exit"]), io.StringIO()
    settings = {"max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0, "color": False}
    messages = talk(session, read=lambda prompt: next(said), out=out, **settings)
    assert [m["content"] for m in messages if m["role"] == "user"] == ["fresh"]
    assert "That exceeds the context of 2048 tokens" in out.getvalue()
    assert out.getvalue().count("tokens/s") == 3

    def end(prompt):
        raise EOFError

    assert talk(session, read=end, out=out, **settings) == []


def chatting(standin, said, monkeypatch=None, stop_at=None):
    """A conversation with a model that is stopped by Ctrl-C at a token of its first answer, and what was printed."""
    session = Session.open("PromptLookup", str(standin), dtype="float32", device="cpu", tree="chain")
    push, count, said, out = TextStream.push, itertools.count(), iter([*said, "/exit"]), io.StringIO()

    def pushed(self, token):
        if next(count) == stop_at:
            raise KeyboardInterrupt
        return push(self, token)

    if stop_at is not None:
        monkeypatch.setattr(TextStream, "push", pushed)
    settings = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "color": False}
    return talk(session, read=lambda _: next(said), out=out, **settings), out.getvalue()


def test_ctrl_c_stops_the_answer_and_not_the_chat(standin, monkeypatch):
    whole, _ = chatting(standin, ["hi"])
    messages, printed = chatting(standin, ["hi", "again"], monkeypatch, stop_at=5)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert "[stopped]" in printed
    assert whole[1]["content"].startswith(messages[1]["content"])
    assert 0 < len(messages[1]["content"]) < len(whole[1]["content"])
    assert messages[2]["content"] == "again"
    messages, printed = chatting(standin, ["hi", "again"], monkeypatch, stop_at=0)
    assert [m["content"] for m in messages if m["role"] == "user"] == ["again"]
    assert "this turn is left out" in printed


@pytest.mark.parametrize("text", ["/help", "/NEW", "/new please", "/quit", "/"])
def test_unknown_commands_are_refused_with_the_list(standin, text):
    messages, printed = chatting(standin, [text])
    assert messages == []
    assert text.split()[0] in printed
    assert "/new" in printed
    assert "/exit" in printed


def test_a_path_is_no_command(standin):
    messages, _ = chatting(standin, ["/etc/hosts: what is it?"])
    assert messages[0]["content"] == "/etc/hosts: what is it?"


def test_control_characters_of_an_answer_are_spelled_out(standin, monkeypatch, capsys):
    """On the terminal; the conversation keeps them as they are."""
    monkeypatch.setattr(TextStream, "push", lambda self, token: "\x1b[2J")
    messages, printed = chatting(standin, ["hi"])
    assert messages[1]["content"] == "\x1b[2J" * 8
    assert printed.startswith(r"\x1b[2J" * 8 + "\n")
    generate("hi", drafter="none", target=str(standin), max_new_tokens=2, dtype="float32", color=True)
    assert capsys.readouterr().out.startswith(r"\x1b[2J" * 2)


@pytest.mark.parametrize(
    ("color", "terminal", "colored"), [(None, True, True), (None, False, False), (True, False, True)]
)
def test_chat_says_how_it_ends_and_colours_terminals(color, terminal, colored, monkeypatch, capsys):
    talked = []
    monkeypatch.setattr(Session, "open", lambda *_, **__: None)
    monkeypatch.setattr("spec_decode.chat.talk", lambda _, **settings: talked.append(settings["color"]))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    chat(color=color)
    assert talked == [colored]
    said = capsys.readouterr().out
    assert "/new starts over, /exit ends, Ctrl-C stops an answer." in said
    assert ("Green" in said) == colored


def test_text_streams_without_broken_characters(standin):
    tokenizer = TargetSpec(str(standin)).tokenizer()
    text = "naïve – 日本語 🙂 end"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # bytes of a character that is not complete


def test_what_a_stream_holds_back_is_shown_at_the_end(standin):
    tokenizer = TargetSpec(str(standin)).tokenizer()
    stream, tokens = TextStream(tokenizer), tokenizer("ab日")["input_ids"]
    assert "".join(map(stream.push, tokens[:-1])) == "ab"
    assert stream.rest() == "\ufffd"  # two of the character's three bytes
    assert stream.rest() == ""


@pytest.mark.parametrize(
    ("text", "tree"),
    [("auto", "auto"), ("chain", None), ("3,2,1", (3, 2, 1)), ("4", (4,)), ("dynamic:3,4,9", DynamicTree(3, 4, 9))],
)
def test_trees_on_the_command_line(text, tree):
    assert parse_tree(text) == tree


@pytest.mark.parametrize("text", ["", "big", "1,x", "dynamic:1,2", "other:1,2,3"])
def test_other_trees_are_refused(text):
    with pytest.raises(ValueError, match="tree must be auto, chain"):
        parse_tree(text)


def test_drafters_on_the_command_line(tiny, tmp_path):
    assert find_drafter("none", tiny.target) is None
    assert isinstance(find_drafter("PromptLookup", tiny.target), PromptLookup)
    assert isinstance(find_drafter("PromptLookup+lookup", tiny.target), WithLookup)
    with pytest.raises(ValueError, match="no tree to add a branch to"):
        find_drafter("none+lookup", tiny.target)
    with pytest.raises(ValueError, match="has to be trained"):
        find_drafter("FastEagle", tiny.target)
    with pytest.raises(ValueError, match="holds no drafter"):
        find_drafter(str(tmp_path), tiny.target)


@pytest.mark.parametrize("name", ["none+lookup", "FastEagle+lookup", "nowhere", "nowhere+lookup"])
def test_a_drafter_that_is_not_there_is_refused_before_the_target_is_loaded(name, monkeypatch):
    def load(self):
        raise AssertionError("loaded")

    monkeypatch.setattr(TargetSpec, "load", load)
    reason = "no tree to|has to be trained|nowhere holds no drafter"
    with pytest.raises(ValueError, match=reason):
        Session.open(name, None, dtype="auto", device="cpu", tree="chain")
    with pytest.raises(ValueError, match=reason):
        benchmark(["PromptLookup", name])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_new_tokens": -3}, "max_new_tokens must be an int >= 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must"),
        ({"seed": 2**63}, "seed must be"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(extra, message, monkeypatch):
    monkeypatch.setattr(Session, "open", None)
    for command in (partial(generate, "Hello"), chat):
        with pytest.raises(ValueError, match=message):
            command(**extra)


@pytest.mark.parametrize("strings", ["abc", [""], [3]])
def test_stop_strings_are_a_list_of_texts(strings, tiny, monkeypatch):
    monkeypatch.setattr(Session, "open", None)
    with pytest.raises(ValueError, match=r"stop_strings must be a list|a stop string must not be empty"):
        generate("Hello", stop_strings=strings)
    with pytest.raises(ValueError, match=r"stop_strings must be a list|a stop string must not be empty"):
        SpeculativeDecoder(tiny.target, tokenizer=object()).generate([[1]], stop_strings=strings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"count": -1}, "count .* got -1"),
        ({"temperatures": [0.0, -1.0]}, "temperature must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int >= 1"),
        ({"seed": 2**63}, "seed must be"),
        ({"output": "file/out"}, "file is a file; name a folder"),
    ],
)
def test_a_benchmark_refuses_settings_before_anything_is_loaded(extra, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(TargetSpec, "load", None)
    with pytest.raises(ValueError, match=message):
        benchmark(["PromptLookup"], **extra)


def test_the_folder_around_a_drafter_names_it(drafter, tmp_path):
    with pytest.raises(ValueError, match=rf"drafter.json is missing; give one of {drafter}"):
        find_drafter(str(tmp_path), None)
    with pytest.raises(ValueError, match="there is no such folder"):
        find_drafter(str(tmp_path / "nowhere"), None)


@pytest.mark.parametrize("table", [[["x"]], [0.5], [[2.0, 0.5]], [[]], [[0.7, 0.7]]])
def test_a_damaged_acceptance_is_refused_by_its_file(drafter, table):
    path = Path(drafter) / "drafter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"acceptance": table}))
    with pytest.raises(ValueError, match=r"drafter\.json is damaged: acceptance of level 0"):
        find_drafter(drafter, None)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"vocab_size": 300}, {"hidden_size": 64}])
def test_another_target_than_the_drafters_is_refused_before_it_is_loaded(drafter, tiny, tmp_path, monkeypatch, changes):
    sizes = {"vocab_size": 258, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    tiny.make(**(sizes | changes)).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(TargetSpec, "load", None)
    [(name, value)] = changes.items()
    reason = (
        rf"{drafter} was trained for another target, .*standin.*, than {tmp_path / 'other'}: .*{name} {value} instead"
    )
    for command in (generate, partial(benchmark, drafters=[drafter])):
        arguments = {"prompt": "hi", "drafter": drafter} if command is generate else {}
        with pytest.raises(ValueError, match=reason):
            command(target=str(tmp_path / "other"), **arguments)


def test_commands_that_do_not_train_import_no_lightning(standin, tmp_path):
    """In a fresh process, which ends as `python -m spec_decode.export` without a drafter does."""
    code = f"""
import importlib, runpy, sys
for name in ("benchmark", "chat", "export", "report"):
    importlib.import_module("spec_decode." + name)
from spec_decode.generate import generate
generate("hi", target={str(standin)!r}, max_new_tokens=2, dtype="float32")
assert not {{"lightning", "pytorch_lightning", "pandas", "torchmetrics"}} & set(sys.modules), sorted(sys.modules)
sys.argv[1:] = ["--drafter", {str(tmp_path)!r}, "--output", {str(tmp_path / "out")!r}]
runpy.run_module("spec_decode.export", run_name="__main__", alter_sys=True)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert found.returncode == 2, found.stderr
    assert f"{tmp_path} holds no drafter" in found.stderr
    assert "Traceback" not in found.stderr


def test_settings_of_generation_that_are_not_applied_are_named(standin, tmp_path, capsys):
    """Its text is that of the plain model, which transformers' generate gives without them."""
    shutil.copytree(standin, tmp_path / "target")
    generation = {"repetition_penalty": 1.5, "min_p": 0.1, "temperature": 0.7, "do_sample": True, "top_k": 20}
    (tmp_path / "target/generation_config.json").write_text(json.dumps(generation))
    settings = {"dtype": "float32", "max_new_tokens": 12, "drafter": "none"}
    plain = generate("hi", target=str(standin), **settings)
    assert capsys.readouterr().err == ""
    found = generate("hi", target=str(tmp_path / "target"), **settings)
    assert found.new_tokens == plain.new_tokens
    said = capsys.readouterr().err
    assert "repetition_penalty 1.5, min_p 0.1" in said
    assert "temperature" not in said


def test_transformers_peers_decode_by_the_same_distribution(standin, tmp_path, monkeypatch):
    shutil.copytree(standin, tmp_path / "target")
    (tmp_path / "target/generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    texts, run = [], transformers.GenerationMixin.generate
    monkeypatch.setattr(
        transformers.GenerationMixin, "generate", lambda *a, **k: texts.append(run(*a, **k)) or texts[-1]
    )
    prompt = [5, 7, 9, 5, 7]
    transformers_peers(str(tmp_path / "target"), "float32", [prompt], max_new_tokens=20, temperature=0.0, stops=[257])
    target = TargetSpec(str(standin), "float32").load()
    plain = SpeculativeDecoder(target).generate([prompt], max_new_tokens=20, stop_tokens=[257])
    assert len(texts) == 4
    assert all(torch.equal(text, plain.sequences) for text in texts)


def test_a_language_model_drafts_when_its_tokenizer_is_the_targets(standin, tiny, tmp_path, byte_tokenizer):
    """Its head may be padded otherwise, as in one family of models; other tokens are named."""
    tiny.make(4, vocab_size=320, max_position_embeddings=2048).save_pretrained(tmp_path / "padded")
    byte_tokenizer.save_pretrained(tmp_path / "padded")
    settings = {"target": str(standin), "dtype": "float32", "device": "cpu", "tree": "2,1"}
    plain = Session.open("none", **settings).decoder.generate([[5, 6]], max_new_tokens=12)
    drafting = Session.open(str(tmp_path / "padded"), **settings).decoder
    assert torch.equal(drafting.generate([[5, 6]], max_new_tokens=12).sequences, plain.sequences)
    other = copy.deepcopy(byte_tokenizer)
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "padded")
    with pytest.raises(ValueError, match=r"target and draft model must share a tokenizer.*<extra>"):
        Session.open(str(tmp_path / "padded"), **settings)


def test_a_digest_of_a_drafters_content_tells_drafters_apart(drafter, tmp_path):
    before = content_digest(tmp_path / "drafter")
    (tmp_path / "drafter/pytorch_model.bin").write_bytes(b"1")
    assert before != content_digest(tmp_path / "drafter")
    (tmp_path / "drafter/pytorch_model.bin").unlink()
    assert before == content_digest(tmp_path / "drafter")
    assert content_digest(tmp_path / "nowhere") == content_digest(Path("PromptLookup")) == ""
    weights = tmp_path / "drafter/drafter.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert before != content_digest(tmp_path / "drafter")


# --- benchmark ---


@pytest.mark.parametrize("change", ["a number", "no checksum", "a row less"])
def test_results_that_were_changed_are_refused(tmp_path, change):
    rows = [{"set": "mine", "temperature": 0.0, "tau": 1.5}, {"set": "mine", "temperature": 1.0, "tau": 1.25}]
    content = {"key": "abc", "rows": rows, "crc32": checksum(rows)}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert read_results(path)["rows"] == rows
    if change == "a number":
        rows[0]["tau"] = 2.5
    elif change == "no checksum":
        del content["crc32"]
    else:
        rows.pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results\.json is damaged or was changed"):
        read_results(path)


@pytest.mark.slow
def test_benchmark_measures_and_keeps_finished_blocks(standin, drafter, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "abc abc abc"}\n{"prompt": "one"}\n')
    settings = {
        "drafters": [drafter, "PromptLookup@auto", str(standin)],
        "assistant": str(standin),
        "target": str(standin),
        "prompts": {"mine": str(prompts)},
        "max_new_tokens": 12,
        "tree": "1,1",
        "dtype": "float32",
        "output": str(tmp_path / "out"),
    }
    rows = benchmark(temperatures=[0.0], **settings)
    assert [row["drafter"] for row in rows][:4] == ["plain", drafter, "PromptLookup@auto", str(standin)]
    assert {row["drafter"] for row in rows[4:]} == {
        "transformers",
        "transformers prompt lookup",
        "transformers assisted",
    }
    weights = sum(p.numel() * 4 for p in TargetSpec(str(standin), "float32").load().parameters()) / 2**20
    plain, trained, lookup, itself = rows[:4]
    assert plain["drafter_mib"] == lookup["drafter_mib"] == 0 < trained["drafter_mib"]
    assert weights <= itself["drafter_mib"] < 1.1 * weights
    assert 0 < plain["decoding_mib"] <= lookup["decoding_mib"] < itself["decoding_mib"]
    assert itself["tau"] > 2  # the target drafts for itself
    for row in rows[1:4]:
        assert row["lossless"] == {"equal": 2, "of": 2, "differing": []}
        assert row["tree"] == [1] * (7 if row is lookup else 2)
        assert row["share_of_cost_model"] > 0
        assert 1 <= row["tau"] <= 8
        assert row["speedup_over_transformers"] == row["end_to_end"] / rows[4]["end_to_end"]
        assert set(row["seconds"]) == {"prefill", "draft", "target", "verify", "commit", "overhead"}
    assert rows[0]["speedup"] == 1
    assert rows[0]["tau"] == 1
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["rows"] == rows
    calls, ran = [], SpeculativeDecoder.generate

    def counted(self, prompts, **options):
        calls.append(options["temperature"])
        return ran(self, prompts, **options)

    monkeypatch.setattr(SpeculativeDecoder, "generate", counted)
    more = benchmark(temperatures=[0.0, 1.0], **settings)
    assert more[: len(rows)] == rows
    assert len(more) == 2 * len(rows)
    assert set(calls) == {1.0}
    together = benchmark(temperatures=[0.0], **(settings | {"batch_size": 2, "output": str(tmp_path / "both")}))
    assert [row["drafter"] for row in together] == [row["drafter"] for row in rows[:4]]  # transformers' own run alone
    for row, alone in zip(together, rows, strict=False):
        assert (row["batch_size"], alone["batch_size"]) == (2, 1)
        if not row["drafter"].endswith("@auto"):  # whose guard goes by the clock
            assert row["tau"] == alone["tau"]  # counted per row, so that sharing passes does not change it
        assert row["cost_model"] is None
        assert sum(count for _, count in row["pass_sizes"]) < sum(count for _, count in alone["pass_sizes"])
    key = saved["key"]
    benchmark(temperatures=[0.0], **(settings | {"seed": 1}))  # other settings: the old results keep their file
    assert json.loads((tmp_path / f"out/results-{key}.json").read_text())["rows"] == more
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.slow
def test_texts_of_one_token_leave_nothing_to_compare(standin, drafter, tmp_path, capsys):
    """Its token comes with the prefill; the target is the drafter's own."""
    settings = {"count": 1, "temperatures": [0.0], "dtype": "float32", "output": str(tmp_path / "out")}
    rows = benchmark([drafter], max_new_tokens=1, **settings)
    assert [row.get("speedup") for row in rows[:2]] == [None, None]
    assert rows[1]["lossless"]["equal"] == 1


def test_tables_fit_a_terminal():
    seconds = dict.fromkeys(("draft", "target", "verify", "commit", "overhead"), 0.25)
    shared = {"set": "mt_bench", "temperature": 0.0, "end_to_end": 100.25}
    row = {
        **shared,
        "drafter": "runs/smollm2/run_0/drafter_best+lookup@4,3,3",
        "tree": [4, 3, 3],
        "tokens_per_second": 123.45,
        "speedup": 1.5,
        "speedup_over_transformers": 1.75,
        "tau": 2.25,
        "acceptance": [0.5, 0.25, 0.125],
        "seconds": seconds | {"target": 1.0},
        "share_of_cost_model": 0.97,
        "drafter_mib": 86.2,
        "decoding_mib": 11.4,
        "lossless": {"equal": 7, "of": 8},
    }
    out = io.StringIO()
    rows = [row, {**shared, "drafter": "transformers"}, row | {"temperature": 1.0, "speedup": None}]
    print_tables(rows, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for cells in (["123.5", "1.50x", "100.2", "1.75x", "2.25", "7/8"], ["4,3,3", "12 50 12 12 12", "97%", "86 + 11"]):
        assert any(all(cell in line for cell in cells) for line in lines)
    assert sum("mt_bench, temperature 1" in line for line in lines) == 2


def test_names_in_tables_are_shown_as_they_are():
    """Neither the terminal obeys control characters in them, nor the table marks of its own."""
    rows = [{"set": "a[bold]\x1b[2J", "temperature": 0.0, "drafter": "x[red]\x1b[2J", "end_to_end": 1.0}]
    out = io.StringIO()
    print_tables(rows, Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert r"a[bold]\x1b[2J" in out.getvalue()
    assert r"x[red]\x1b[2J" in out.getvalue()


def test_first_divergence():
    assert first_divergence([[1, 2], [1, 2, 3], [4], [1, 5]], [[1, 2], [1, 2], [4, 5], [1, 6]]) == [None, 2, 1, 1]


def test_margin_is_what_a_draw_was_won_by(tiny):
    text = [3, 5, 8]
    logits = tiny.target.logits(tiny.target(torch.tensor([text])).final[:, -1])
    best = logits[0].double().topk(2).values
    assert margin(tiny.target, text, Sampling(0.0), 0) == pytest.approx(float(best[0] - best[1]))
    sampling = Sampling(1.0)
    assert margin(tiny.target, text, sampling, 2) > 0
    # Lowering the winner by more than the margin changes the draw.
    seeds, position = row_seeds(2, 1), torch.tensor([3])
    winner, lowered = int(sampling.draw(logits, seeds, position)), logits.double().clone()
    gap = margin(tiny.target, text, sampling, 2)
    lowered[0, winner] -= gap - 1e-6
    assert int(sampling.draw(lowered, seeds, position)) == winner
    lowered[0, winner] -= 2e-6
    assert int(sampling.draw(lowered, seeds, position)) != winner
