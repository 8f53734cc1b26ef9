"""Whole runs from the command line's arguments: results, files, resuming, stored teachers, refusals."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import GenerationConfig

from kd_common.hub.language_models import load_causal_lm, load_tokenizer, model_ends
from kd_common.run.export import Export
from llm_kd.cache_teacher import main as cache_teacher_main
from llm_kd.evaluation import answers
from llm_kd.fit import build, main, run
from llm_kd.models import Backbone
from llm_kd.teacher import CacheError
from llm_kd.training.summary import print_summary

PROMPTS = [f"Count to {n}." for n in range(2, 30)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def arguments(tmp_path, save_model):
    """A quick run: the teacher is a tiny random model that writes at most six tokens per prompt."""
    teacher = save_model(vocab=272)
    train = write_jsonl(tmp_path / "train.jsonl", [{"instruction": text} for text in PROMPTS[:20]])
    val = write_jsonl(tmp_path / "val.jsonl", [{"instruction": text} for text in PROMPTS[20:]])

    def make(*extra, run_dir="run"):
        return [
            f"--run_dir={tmp_path / run_dir}",
            "--seed_everything=1",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_progress_bar=false",
            f"--model.teacher.name={teacher}",
            "--model.student.layers=2",
            f"--data.train={train}",
            f"--data.val={val}",
            "--data.sampling.max_new_tokens=6",
            "--data.batch_size=4",
            "--answers=2",
            *extra,
        ]

    return make


def test_a_run_leaves_what_it_promises(arguments, tmp_path, capsys):
    cli = build(arguments())
    result = run(cli)
    print_summary(result, cli.model, cli.datamodule)
    assert [epoch["step"] for epoch in result.history] == [5, 10]
    assert result.best["kl"] < result.before["kl"]
    assert result.before["teacher_nll"] == pytest.approx(result.last["teacher_nll"])
    assert result.parameters["student"] < result.parameters["teacher"]
    assert set(result.answers) == {"before", "after"}
    assert len(result.answers["after"].responses) == 2
    assert 0.05 < result.peak_memory_gib < 64
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir() if "tfevents" not in path.name} == {
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "student_best",
        "student_last",
    }
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    printed = capsys.readouterr().out
    assert "held-out responses of the teacher" in printed
    for expected in (
        "run/student_{last,best}",
        "NLL",
        "TAR",
        "ROUGE-L",
        "student before",
        "teacher",
        "peak memory",
        "answer, after",
    ):
        assert expected in printed
    columns = (run_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/tar", "val/kl", "val/nll", "epoch/tar"} <= set(columns)

    student = load_causal_lm(str(run_dir / "student_last"))
    assert len(load_tokenizer(str(run_dir / "student_last"))) == 258
    for name, value in cli.model.student_with_head.student.model.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    checkpoint = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    names = [name for name in checkpoint["state_dict"] if "layers" in name]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {0, 1}, "the student alone, two layers"

    shutil.rmtree(run_dir / "student_best")  # as in a resumed run whose best epoch came before
    print_summary(result, cli.model, cli.datamodule)
    assert "run/student_last\n" in capsys.readouterr().out


def test_a_tokenizer_without_a_padding_token_learns_as_one_with_any(arguments):
    """Rows are filled up with the end of a turn then, whose supervised places still count; the student writes, too."""
    (name,) = (a.partition("=")[2] for a in arguments() if a.startswith("--model.teacher.name="))
    settings, found = Path(name) / "tokenizer_config.json", []
    content = json.loads(settings.read_text())
    del content["pad_token"]
    for padding in ({}, {"pad_token": "<|im_start|>"}):
        settings.write_text(json.dumps(content | padding))
        cli = build(arguments("--config=rollouts/mixed", "--answers=0", f"--name=padding{len(padding)}"))
        last = run(cli).last
        found.append([cli.datamodule.pad_id, *(last[key] for key in ("nll", "kl", "train_loss"))])
    assert [pad for pad, *_ in found] == [257, 256]
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-5)


STATEFUL = [
    "--config=objectives/taid",
    "--config=selectors/speck",
    "--config=rollouts/adaptive_replay",
    "--model.rollout.sampling.max_new_tokens=4",
    "--model.rollout.step=1.0",
    "--model.rollout.tolerance=-9",
    "--model.rollout.capacity=6",
]


def assert_same(found, expected):
    for name, value in expected.state_dict().items():
        other = found.state_dict()[name]
        same = torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
        assert same, name
    assert found.rollout.state_dict() == expected.rollout.state_dict()
    assert len(found.history) == len(expected.history)
    for key in ("kl", "nll", "train_loss", "train_tar"):
        assert found.history[-1][key] == expected.history[-1][key], key


KILLED = """
import os, signal, sys
from llm_kd.training import distillation
from llm_kd.fit import build, run
step = distillation.DistillationModule.training_step
def training_step(self, batch, batch_idx):
    if self.current_epoch == 1 and batch_idx == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
distillation.DistillationModule.training_step = training_step
run(build(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(arguments, tmp_path):
    """From the last epoch's end, and from a checkpoint inside the epoch; a steps checkpoint changes no result."""
    settings = [*STATEFUL, "--trainer.max_epochs=3"]
    whole = build(arguments(*settings, run_dir="whole"))
    run(whole)
    assert len(whole.model.rollout.memory) == 6
    every_two_steps = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "filename": "{step}", "dirpath": str(tmp_path), "save_top_k": -1},
    }
    callbacks = f"--trainer.callbacks={json.dumps([every_two_steps])}"
    command = [sys.executable, "-c", KILLED, *arguments(*settings, callbacks, run_dir="killed")]
    process = subprocess.run(command, env=os.environ, capture_output=True, timeout=250, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    for name in ("killed/checkpoints/last.ckpt", "step=8.ckpt"):
        # Beside the first lies its run's configuration.
        same = arguments(*settings, callbacks, run_dir="killed") if "step" in name else []
        resumed = build(["--ckpt_path", str(tmp_path / name), *same])
        assert resumed.trainer.max_epochs == 3
        run(resumed)
        assert_same(resumed.model, whole.model)


def test_the_responses_are_written_once(arguments, tmp_path, monkeypatch):
    from llm_kd.data import responses

    first = build(arguments())
    run(first)
    monkeypatch.setattr(responses, "generate", lambda *args, **kwargs: pytest.fail("written again"))
    second = build(arguments(run_dir="second"))
    run(second)
    assert_same(second.model, first.model)


def cached(arguments, folder, *extra):
    """The command line that stores the teacher of a run: the run's own, and where to."""
    return [f"--folder={folder}", *arguments(), *extra]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=0", r"^size must lie in \[1, 258\], got 0$"),
        ("--size=100000", r"^size must lie in \[1, 258\], got 100000$"),
        ("--dtype=int4", r"^dtype must be one of float16, bfloat16, float32, got 'int4'$"),
    ],
)
def test_what_a_cache_cannot_store_is_refused_before_the_teacher_is_loaded(
    arguments, tmp_path, monkeypatch, flag, message
):
    monkeypatch.setattr("llm_kd.cache_teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        cache_teacher_main(cached(arguments, tmp_path / "cache", flag))


def test_training_from_a_whole_stored_teacher_equals_training_online(arguments, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--folder .*file/cache: .*file is a file; name a folder"):
        cache_teacher_main(cached(arguments, tmp_path / "file" / "cache"))
    cache = cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=258", "--dtype=float32"))
    assert len(cache) == len(PROMPTS)
    online, stored = build(arguments()), build(arguments(f"--model.teacher.cache={tmp_path / 'cache'}", run_dir="two"))
    results = [run(online), run(stored)]
    for name in ("kl", "nll", "teacher_nll", "tar", "train_loss", "train_tar"):
        assert results[1].last[name] == pytest.approx(results[0].last[name], rel=1e-3), name
    assert "teacher" not in results[1].parameters


def test_training_from_a_truncated_teacher_follows_a_lower_bound(arguments, tmp_path, capsys):
    cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=8"))
    settings = arguments(f"--model.teacher.cache={tmp_path / 'cache'}", "--trainer.max_epochs=1", run_dir="two")
    result = main(settings)
    printed = capsys.readouterr().out
    assert f"≥ {result.last['kl']:.3f}" in printed
    assert "a lower bound: model.teacher.cache holds" in printed
    whole = main(arguments("--trainer.max_epochs=1"))
    assert "≥" not in capsys.readouterr().out
    assert 0 < result.before["kl"] < whole.before["kl"]
    assert result.before["nll"] == pytest.approx(whole.before["nll"], rel=1e-5)
    assert "teacher_nll" not in result.last
    with pytest.raises(ValueError, match="TAID needs the teacher's whole distribution"):
        run(build([*settings, "--config=objectives/taid"]))
    with pytest.raises(ValueError, match="k=9"):
        run(build([*settings, "--model.selector=TopK", "--model.selector.k=9"]))


def test_examples_that_a_cache_lacks_are_counted_before_training(arguments, tmp_path):
    cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=8", "--data.limit_train=1"))
    with pytest.raises(CacheError, match=r"[1-9]\d* of \d+ examples are not in model\.teacher\.cache"):
        run(build(arguments(f"--model.teacher.cache={tmp_path / 'cache'}")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--data.packing=true", "--data.batch_size=20"],
            r"^data\.batch_size 20: the \d training rows do not fill one batch; lower it to at most \d$",
        ),
        (["--model.selector=TopK", "--model.selector.k=1000"], r"^selector\.k must be at most 258"),
        (["--model.selector=TopK", "--model.selector.k=0"], r"^selector\.k .* got 0$"),
        (["--trainer.limit_train_batches=0"], r"trainer\.limit_train_batches 0 leaves nothing to learn from"),
    ],
)
def test_settings_are_refused_before_anything_is_measured(arguments, monkeypatch, settings, message):
    monkeypatch.setattr("llm_kd.fit.validate", lambda cli: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        run(build(arguments(*settings)))


def rewrite_settings(folder, **changed):
    """Change entries of the generation_config.json of a model."""
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_the_ends_and_settings_of_the_teacher_reach_the_saved_student(arguments, tmp_path, caplog):
    teacher = tmp_path / "teacher"
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.1}
    settings = arguments("--trainer.max_epochs=1")
    rewrite_settings(teacher, eos_token_id=[5, 9], **odd)
    with caplog.at_level(logging.INFO):
        cli = build(settings)
    assert "temperature 0.9, top_p 0.6" in caplog.text
    assert str(teacher) in caplog.text
    ends = [5, 9, 257]
    assert cli.model.eos_ids == ends
    run(cli)
    for name in ("student_best", "student_last"):
        folder = tmp_path / "run" / name
        kept = GenerationConfig.from_pretrained(folder)
        assert (kept.eos_token_id, kept.temperature, kept.repetition_penalty) == (ends, None, 1.1)
        assert sorted(model_ends(str(folder), load_tokenizer(str(folder)))) == ends


def test_packing_is_tried_on_both_models_before_anything_is_measured(arguments, monkeypatch):
    tried = []
    for module in ("distillation", "teacher"):
        record = lambda backbone, role: tried.append((type(backbone), role))  # noqa: E731
        monkeypatch.setattr(f"llm_kd.training.{module}.check_packing", record)
    monkeypatch.setattr("llm_kd.fit.validate", lambda cli: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        run(build(arguments("--data.packing=true", "--data.max_length=64", "--data.batch_size=1")))
    assert tried == [(Backbone, "student"), (Backbone, "teacher")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.batch_size=64"], r"^data\.batch_size 64: the 20 training rows do not .* lower it to at most 20$"),
        (["--data.max_length=7"], r"^train: none of the 20 rows fits max_length=7; raise it"),
    ],
)
def test_data_are_refused_before_the_teacher_is_loaded(arguments, monkeypatch, settings, message):
    monkeypatch.setattr("llm_kd.training.teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run(build(arguments(*settings)))


def test_a_cache_of_another_teacher_is_refused(arguments, tmp_path, save_model):
    cache_teacher_main(
        cached(arguments, tmp_path / "cache", "--size=8", f"--model.teacher.name={save_model('b', seed=1)}")
    )
    with pytest.raises(CacheError, match="holds another teacher or vocabulary"):
        run(build(arguments(f"--model.teacher.cache={tmp_path / 'cache'}")))


def test_a_cache_of_the_same_weights_with_other_settings_is_refused(arguments, tmp_path):
    """Other positions make another teacher of the same tensors."""
    cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=8"))
    path = tmp_path / "teacher" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 500.0}
    path.write_text(json.dumps(config))
    with pytest.raises(CacheError, match="holds another"):
        run(build(arguments(f"--model.teacher.cache={tmp_path / 'cache'}")))
    with pytest.raises(CacheError, match="holds another"):
        cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=8"))


@pytest.fixture
def answered(arguments, tmp_path):
    """Settings of a run on a data set's answers, and a cache for them."""
    rows = [{"instruction": text, "output": text[::-1]} for text in PROMPTS]
    files = [f"--data.{split}={write_jsonl(tmp_path / f'{split}_answers.jsonl', rows)}" for split in ("train", "val")]
    settings = ["--data.responses=dataset", "--trainer.max_epochs=1", "--answers=0", *files]
    data = [argument for argument in settings if argument.startswith("--data.")]
    cache_teacher_main(cached(arguments, tmp_path / "cache", "--size=8", *data))
    return [*settings, f"--model.teacher.cache={tmp_path / 'cache'}"]


def test_a_recipe_gives_cache_and_run_the_same_data(tmp_path, save_model):
    """Its length limit is not the default one; the long answer would be missing from the cache."""
    teacher = save_model("long", max_position_embeddings=1024)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Say a.", "output": n * "a"} for n in (3, 700)])
    recipe = ["--config=pairs/own", f"--model.teacher.name={teacher}", f"--data.train={rows}", f"--data.val={rows}"]
    cache = cache_teacher_main([f"--folder={tmp_path / 'cache'}", "--size=8", *recipe])
    data = build([*recipe, f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"]).datamodule
    data.setup("fit")
    assert sorted(cache.keys()) == sorted(example.key for example in data.splits["train"].examples)
    assert len(cache) == 2


def test_a_stored_teacher_is_known_by_its_files_and_not_loaded(arguments, answered, tmp_path, monkeypatch):
    """Its path spelled otherwise is the same teacher, other weights or another precision in that place are not."""
    monkeypatch.setattr("llm_kd.training.teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    spelled = ["--model.teacher.name=./teacher/"]
    assert run(build(arguments(*answered, *spelled))).last["kl"] > 0
    with pytest.raises(CacheError, match=r"in float32.*is SHA-256 .* in bfloat16"):
        run(build(arguments(*answered, "--model.teacher.dtype=bfloat16")))
    weights = tmp_path / "teacher/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CacheError, match=r"holds another teacher: it was written by .*teacher "):
        run(build(arguments(*answered)))


def test_dataset_answers(arguments, tmp_path):
    rows = [{"instruction": text, "output": text[::-1]} for text in PROMPTS]
    files = [f"--data.{split}={write_jsonl(tmp_path / f'{split}_answers.jsonl', rows)}" for split in ("train", "val")]
    result = run(build(arguments("--data.responses=dataset", *files)))
    assert result.answers["after"].references[0] == [PROMPTS[0][::-1]]
    assert set(result.answers) == {"before", "after", "teacher"}


def test_prompts_alone_are_enough_on_policy(arguments):
    on_policy = ["--config=rollouts/on_policy", "--model.rollout.sampling.max_new_tokens=5"]
    cli = build(arguments(*on_policy))
    result = run(cli)
    assert [epoch["step"] for epoch in result.history] == [5, 10]
    assert result.last["train_loss"] > 0
    assert cli.datamodule.splits["train"].supervised == 0  # the teacher wrote nothing for them
    assert cli.datamodule.splits["val"].supervised > 0
    mixed = build(arguments(*on_policy, "--model.rollout.fraction=0.5", run_dir="mixed"))
    run(mixed)
    assert mixed.datamodule.splits["train"].supervised > 0


def test_rollouts_that_could_outgrow_the_positions_are_refused(arguments):
    with pytest.raises(ValueError, match="exceed the student's 512 positions"):
        run(build(arguments("--config=rollouts/on_policy", "--model.rollout.sampling.max_new_tokens=500")))


def test_answers_that_no_prompt_leaves_positions_for_are_refused_before_training(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_kd.training.teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    path = write_jsonl(tmp_path / "short.jsonl", [{"instruction": "Say a.", "output": "a"}] * 4)
    files = ["--data.responses=dataset", f"--data.train={path}", f"--data.val={path}"]
    with pytest.raises(ValueError, match=r"data.sampling.max_new_tokens 500, .* the student's 512 .* answers to 0"):
        run(build(arguments(*files, "--data.sampling.max_new_tokens=500")))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.quick("student-train")
def test_conversations_beyond_the_positions_are_refused(arguments, tmp_path, save_model, monkeypatch, role, split):
    """Learned positions would end in an index error, rotary ones would go on; the teacher is not loaded for it."""
    monkeypatch.setattr("llm_kd.training.teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    short = {"instruction": "Say a.", "output": "a"}
    rows = {name: [short, {**short, "output": 520 * "a"} if name == split else short] for name in ("train", "val")}
    files = [f"--data.{name}={write_jsonl(tmp_path / f'{name}_long.jsonl', found)}" for name, found in rows.items()]
    room = {"teacher": 1024, "student": 1024, role: 512}
    names = {name: save_model(f"{name}s", n_positions=count, architecture="gpt2") for name, count in room.items()}
    models = [f"--model.{name}.name={folder}" for name, folder in names.items()]
    command = arguments("--data.responses=dataset", "--data.max_length=1024", "--model.student.layers=all", *files)
    cli = build([*command, *models])
    with pytest.raises(ValueError, match=rf"{split}: .* exceed the {role}'s 512 positions; set data.max_length to 512"):
        run(cli)


def test_what_the_teacher_may_write_counts_before_it_writes(arguments, monkeypatch):
    monkeypatch.setattr("llm_kd.training.teacher.load_teacher", lambda spec: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"train: conversations of up to .* exceed the student's 512 positions"):
        run(build(arguments("--data.max_length=2048", "--data.sampling.max_new_tokens=500")))


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*could not find the monitored key")  # no validation, no best
@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.quick("7")
def test_a_run_that_stops_inside_an_epoch_reports_its_last_step(arguments, steps, capsys):
    result = main(arguments(f"--trainer.max_steps={steps}"))
    assert [epoch["step"] for epoch in result.history] == [*range(5, steps, 5), steps]
    assert result.last["kl"] != result.before["kl"]
    assert result.last["train_loss"] > 0
    assert "last and best" in capsys.readouterr().out


def test_a_setting_of_the_default_class_needs_no_class(arguments):
    cli = build(arguments("--model.selector.k=3"))
    assert (type(cli.model.student_with_head.head.selector).__name__, cli.model.student_with_head.head.selector.k) == (
        "TopK",
        3,
    )
    cli = build(arguments("--config=selectors/speck", "--model.selector.k=3", "--model.lr_schedule.warmup_epochs=1"))
    assert (type(cli.model.student_with_head.head.selector).__name__, cli.model.student_with_head.head.selector.k) == (
        "SpecK",
        3,
    )
    assert cli.model.lr_schedule.warmup_epochs == 1


@pytest.mark.parametrize(
    ("tokens", "shown"), [([257], "(no text, only '<|im_end|>')"), ([198, 198], r"(no text, only '\n\n')")]
)
@pytest.mark.quick("tokens1-(no text, only '\\\\n\\\\n')")
def test_an_answer_without_text_is_described(arguments, monkeypatch, capsys, tokenizer, tokens, shown):
    """One that ends at once, and white space without an end."""
    monkeypatch.setattr(answers, "generate", lambda model, prompts, *args, **kwargs: [tokens for _ in prompts])
    assert not tokenizer.decode(tokens, skip_special_tokens=True).strip()
    main(arguments("--trainer.max_epochs=1"))
    printed = capsys.readouterr().out
    assert f"answer, before                {shown}" in printed
    assert f"answer, after                 {shown}" in printed


def test_a_student_that_a_kill_caught_between_two_names_is_put_in_place(arguments, tmp_path):
    module = build(arguments()).model
    folder = tmp_path / "killed"
    for state in ("old", "partial"):
        (folder / f"student_best.{state}").mkdir(parents=True)
    (folder / "student_best.partial/model.safetensors").write_text("complete")
    Export(folder).on_fit_start(SimpleNamespace(is_global_zero=True, ckpt_path=None), module)
    assert [path.name for path in folder.iterdir()] == ["student_best"]
    assert (folder / "student_best/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--trainer.precision=16-mixed"], "trainer.precision 16-mixed"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs or trainer.max_steps"),
        (["--model.teacher.name=nowhere"], "no such folder, and no name on the Hub"),
        (["--model.student.layers=7"], r"student.layers must lie in \[1, 3\]"),
        (["--model.student.name=other"], "keeps layers of the teacher, but the student is other: set"),
        (["--trainer.precision=bf16-true"], "small updates vanish there. Use bf16-mixed, or set model.student.dtype"),
        (["--answers=-1"], "--answers must be at least 0"),
        (
            ["--data.max_length=6"],
            r"^data\.max_length 6 leaves no room for a prompt .* data\.sampling\.max_new_tokens 6; raise the one",
        ),
        (["--data.truncate=true"], "truncate cuts a data set's answers"),
        (["--data.sampling.top_p=0.9"], "temperature 0 takes the most likely token, so top_p and top_k do nothing"),
        (["--model.learning_rate=0"], "model.learning_rate must be > 0"),
    ],
)
def test_refusals_before_any_work(arguments, extra, match):
    with pytest.raises(ValueError, match=match):
        build(arguments(*extra))


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
@pytest.mark.quick("bf16-true-dtype1")
def test_true_precisions(arguments, precision, dtype):
    name = str(dtype).removeprefix("torch.")
    precisions = [f"--trainer.precision={precision}", f"--model.student.dtype={name}", f"--model.teacher.dtype={name}"]
    cli = build(arguments(*precisions, "--answers=0", "--trainer.max_epochs=1"))
    assert run(cli).last["kl"] > 0
    assert {parameter.dtype for parameter in cli.model.parameters()} == {dtype}


@pytest.mark.parametrize("extra", [["--model.topk=3"], ["--trainer.max_epoch=2"], ["--model.selector=NoSuch"]])
def test_unknown_options(arguments, extra):
    with pytest.raises(SystemExit) as stopped:
        build(arguments(*extra))
    assert stopped.value.code == 2


def test_the_default_is_selectkd_on_the_embedded_model():
    config = yaml.safe_load((Path(__file__).parents[2] / "packages/llm_kd/src/llm_kd/configs/default.yaml").read_text())
    settings = config["model"]["init_args"]
    assert settings["teacher"] == {"name": "smollm2-135m-instruct"}
    assert settings["student"] == {"layers": 10}
    assert all(settings[name].keys() == {"class_path"} for name in ("objective", "selector", "rollout", "lr_schedule"))
