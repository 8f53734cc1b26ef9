"""Whole runs on a stand-in: results, files, replay, every recipe, every drafter, bad input."""

import pytest
import torch

import spec_decode.training.drafter_module
from spec_decode.data.prompts import packaged_prompts
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.session import Session
from spec_decode.drafters import load_drafter
from spec_decode.fit import CONFIG_DIR, build, main, run
from spec_decode.models.target import fast_dtype

RECIPES = sorted(
    str(p.relative_to(CONFIG_DIR).with_suffix("")) for p in CONFIG_DIR.rglob("*.yaml") if p.parent.name != "compare"
)


@pytest.fixture
def finished(fit_args, capsys):
    result = main([*fit_args, "--measure_prompts=1"])
    return result, capsys.readouterr().out


def test_a_run_its_table_and_its_files(finished, fit_args, tmp_path):
    result, printed = finished
    assert [epoch["epoch"] for epoch in result.history] == [0, 1]
    assert result.last["loss"] < result.history[0]["loss"]
    assert 1 <= result.best["tau"] <= 4
    assert set(result.measured) >= {"plain", "chain"}
    # fp32: what the drafter proposes does not show in the text.
    assert result.measured["chain"].texts == result.measured["plain"].texts
    assert result.measured["plain"].tau == 1
    for words in ("FastEagle", "level 3", "tau", "accepted + 1", "speed-up", "drafter_{last,best}"):
        assert words in printed
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if "tfevents" not in p.name)
    assert names == ["checkpoints", "config.yaml", "drafter_best", "drafter_last", "hparams.yaml", "metrics.csv"]

    cli = build([*fit_args, f"--config={tmp_path / 'run/config.yaml'}", f"--run_dir={tmp_path / 'again'}"])
    again = run(cli)
    assert [e["loss"] for e in again.history] == [e["loss"] for e in result.history]
    target = cli.model.target
    drafter = load_drafter(tmp_path / "run/drafter_last", target)
    assert drafter.acceptance == result.last["acceptance"]
    for key, value in cli.model.drafter.state_dict().items():
        assert torch.equal(drafter.state_dict()[key], value)
    prompt = cli.datamodule.held_out[:1]
    plain = SpeculativeDecoder(target).generate(prompt, max_new_tokens=12).sequences
    assert torch.equal(SpeculativeDecoder(target, drafter).generate(prompt, max_new_tokens=12).sequences, plain)


def test_a_template_of_the_run_gives_prompts_and_ends_wherever_its_drafter_is_used(fit_args, standin, tmp_path):
    own = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_start|>' }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    cli = build([*fit_args, f"--data.chat_template={own}", "--trainer.max_epochs=1", "--measure_prompts=0"])
    run(cli)
    session = Session.open(str(tmp_path / "run/drafter_last"), None, dtype="float32", device="cpu", tree="chain")
    ends = {session.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert ends <= set(cli.datamodule.stops) == set(session.stops)
    ids = session.encode([{"role": "user", "content": "abc"}])
    assert session.tokenizer.decode(ids) == "user: abc<|im_start|>assistant: "
    assert session.tokenizer.decode(cli.datamodule.held_out[0]).startswith("user: ")


def test_online_and_cached_features_train_the_same(fit_args, tmp_path):
    """Up to the bfloat16 of the cache."""
    cached = run(build([*fit_args, f"--run_dir={tmp_path / 'a'}"]))
    online = run(build([*fit_args, f"--run_dir={tmp_path / 'b'}", "--data.features=online"]))
    for one, other in zip(cached.history, online.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["loss"] != other["loss"]


@pytest.mark.parametrize("name", ["Eagle3", "Medusa", "DraftModel"])
@pytest.mark.quick("Eagle3")
def test_every_other_drafter_learns(fit_args, name):
    drafter = [f"--model.drafter={name}", "--model.drafter.depth=2", "--model.drafter.draft_vocab=100"]
    cli = build([*fit_args, *drafter, "--model.feature_weight=0.1", "--trainer.max_epochs=3"])
    result = run(cli)
    assert result.last["loss"] < result.history[0]["loss"]
    vocabulary = cli.model.drafter.vocabulary
    assert (vocabulary.diff() > 0).all()
    counts = cli.datamodule.token_counts()
    assert counts[vocabulary].sum() == counts.topk(100).values.sum()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_steps_on_a_stand_in(fit_args, standin, recipe):
    """Parsed with its own settings; only what a stand-in cannot have is overridden."""
    shared = ("--run_dir", "--trainer.acc", "--trainer.enable", "--trainer.log", "--measure")
    keep = [argument for argument in fit_args if argument.startswith(shared)]
    config = [f"--config={recipe}", *keep]
    plain = build_config(config)
    reduced = plain["model"]["init_args"]["drafter"]["init_args"]["draft_vocab"] is not None
    cli = build(
        [
            *config,
            f"--model.target.name={standin}",
            f"--model.drafter.draft_vocab={64 if reduced else 'null'}",
            "--data.limit=6",
            "--data.val_prompts=2",
            "--data.sampling.max_new_tokens=16",
            "--data.max_length=400",
            "--trainer.max_epochs=1",
        ]
    )
    result = run(cli)
    assert torch.tensor(result.last["loss"]).isfinite()
    assert cli.trainer.global_step > 0
    chosen = cli.model.target_spec.dtype
    assert cli.model.target.dtype == getattr(torch, fast_dtype() if chosen == "auto" else chosen)
    assert cli.model.drafter.dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX2", "float32"), ("DEFAULT", "float32"), ("AVX512", "bfloat16")]
)
def test_the_fast_precision_is_the_machines(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast_dtype() == expected


def build_config(args):
    """The parsed settings, without building anything."""
    import contextlib
    import io

    import yaml

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        build([*args, "--print_config"])
    return yaml.safe_load(text.getvalue())


def test_the_papers_targets_have_recipes():
    names = {build_config([f"--config={r}"])["model"]["init_args"]["target"]["name"] for r in RECIPES}
    assert names == {
        "smollm2-135m-instruct",
        "lmsys/vicuna-13b-v1.3",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    }


def test_packaged_prompts_are_many_and_distinct():
    prompts = packaged_prompts()
    assert len(prompts) == len(set(prompts)) == 2400
    assert prompts == packaged_prompts()


# --- bad input ---


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainer.precision=16-mixed"], "use bf16-mixed"),
        (["--trainer.max_epochs=-1"], "set trainer.max_epochs"),
        (["--model.level_decay=0"], "level_decay must lie in"),
        (["--model.learning_rate=0"], "learning_rate must be > 0"),
        (["--model.chunk=0"], "chunk must be >= 1"),
        (["--data.max_length=12"], "leaves no room for a prompt"),
        (["--data.val_prompts=10"], "leave none to train on"),
        (["--data.batch_size=0"], "batch_size must be >= 1"),
        (["--data.answers=file"], "set data.prompts"),
        (["--model.shard_target=true", "--data.features=cached"], "set data.features online"),
        (["--data.sampling.temperature=-1"], "temperature must be"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(fit_args, extra, message):
    with pytest.raises(ValueError, match=message):
        build([*fit_args, *extra])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--model.depth=3"], "--model.depth"),
        (["--model.drafter=Medusa", "--model.drafter.dept=3"], "did you mean depth"),
        (["--model.drafter.depth=[]"], "--model.drafter.depth"),
        (["--model.drafter.draft_vocab=many"], "--model.drafter.draft_vocab"),
        (["--model.drafter=Medus"], "did you mean Medusa"),
        (["--model.drafter=PromptLookup"], "no such TrainableDrafter"),
    ],
)
def test_settings_that_do_not_parse_are_named(fit_args, capsys, extra, named):
    with pytest.raises(SystemExit):
        build([*fit_args, *extra])
    assert named in capsys.readouterr().err


def test_a_sharded_bfloat16_target_is_refused_on_cpus(fit_args, monkeypatch):
    """One process stands for two: the refusal comes before they talk to each other."""
    monkeypatch.setattr(spec_decode.training.drafter_module, "world_size", lambda: 2)
    cli = build([*fit_args, "--model.shard_target=true", "--data.features=online", "--model.target.dtype=bfloat16"])
    with pytest.raises(ValueError, match=r"shard_target on CPUs needs model\.target\.dtype float32"):
        run(cli)


def test_packing_takes_nothing_from_the_count_of_parameters(fit_args):
    cli = build([*fit_args, "--model.target.dtype=bfloat16", "--trainer.max_epochs=1"])
    count = sum(p.numel() for p in cli.model.target.parameters())
    assert run(cli).parameters["target"] == count


def test_bad_settings_that_need_the_tokenizer(fit_args, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no prompt has 1 to 2 tokens"):
        run(build([*fit_args, "--data.max_length=14"]))
    with pytest.raises(ValueError, match="exceeds the target's context 2048"):
        run(build([*fit_args, "--data.max_length=4000"]))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="line 2: needs prompt"):
        build([*fit_args, f"--data.prompts={prompts}"])
    with pytest.raises(ValueError, match="no such file"):
        build([*fit_args, "--data.prompts=nowhere.jsonl"])
    for long in (["--data.batch_size=9"], ["--data.epoch_rows=2", "--data.batch_size=3"]):
        cli = build([*fit_args, *long])
        monkeypatch.setattr(cli.trainer, "fit", None)  # refused before anything is written
        with pytest.raises(ValueError, match=r"^data\.batch_size \d: the \d .*sequences.* do not fill one batch"):
            run(cli)
