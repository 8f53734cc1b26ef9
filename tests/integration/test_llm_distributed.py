"""Language models on two gloo processes, replicated and sharded, against one process with the doubled batch."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from kd_common.hub import load_causal_lm
from kd_common.sampling import SamplingParams
from llm_kd.data.example import Example
from llm_kd.data.loader import TextLoader
from llm_kd.fit import main
from llm_kd.models import LoRASpec, StudentSpec, TeacherSpec, load_teacher
from llm_kd.objectives.fkl import ForwardKL
from llm_kd.objectives.rkl import ReverseKL
from llm_kd.objectives.taid import TAID
from llm_kd.selection.speck import SpecK
from llm_kd.selection.topk import TopK
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule
from llm_kd.training.rollout import AdaptiveReplay, OnPolicy

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

# name: settings of the module, whether batches are accumulated
VARIANTS = {
    "FKL": ({"objective": ForwardKL, "selector": TopK}, 1),
    "TAID, accumulated": ({"objective": TAID, "selector": TopK}, 2),
    "RKL, selected": ({"objective": ReverseKL, "selector": lambda: TopK(k=40, beta=0.0), "normalize": "selected"}, 1),
}
STRATEGIES = ["ddp", "fsdp2"]


def sequences(count=21, seed=3):
    """Unequal lengths; 21 of them leave the ranks different shares of the last validation batch."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 6), (1, 9)))
        tokens = torch.randint(0, 60, (prompt + answer,), generator=generator).tolist()
        examples.append(Example(tokens, [False] * prompt + [True] * answer, prompt))
    return examples


def make(folder, settings, lora=None):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    torch.manual_seed(0)  # adapters start at random
    student = StudentSpec(layers=2, dtype="float64", lora=lora)
    model = DistillationModule(TeacherSpec(folder, dtype="float64"), student, learning_rate=1e-2, **settings)
    model.attach_teacher(OnlineTeacher(load_teacher(model.teacher_spec)))
    return model


def fit(model, batch, accumulate, rank=0, world=1, epochs=2, ckpt_path=None, keep_in=None, **settings):
    """Train; with ``keep_in`` every epoch's checkpoint stays in that folder."""
    keep = ModelCheckpoint(keep_in, filename="{epoch}", save_top_k=-1)
    share = {"pad_id": 63, "rank": rank, "world_size": world}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=keep_in is not None,
        callbacks=[] if keep_in is None else [keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(
        model,
        TextLoader(sequences(), batch, shuffle=True, seed=5, **share),
        TextLoader(sequences(), batch, shuffle=False, **share),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return trainer


def distributed_runs(teacher, root):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {}
    for strategy in STRATEGIES:
        for name, (settings, accumulate) in VARIANTS.items():
            model = make(teacher, settings)
            trainer = fit(model, 2, accumulate, rank, 2, devices=2, strategy=strategy)
            trainer.save_checkpoint(f"{root}/{strategy} {name}.ckpt")
            model.export(Path(root) / f"{strategy} {name}")
            found[f"{strategy} {name}"] = {"history": model.history, "steps": trainer.global_step}
        model = make(teacher, {"objective": ReverseKL, "rollout": OnPolicy(sampling=SamplingParams(max_new_tokens=4))})
        trainer = fit(model, 2, 1, rank, 2, devices=2, strategy=strategy)
        found[f"{strategy} on-policy"] = {"history": model.history, "steps": trainer.global_step}
        model = make(teacher, {"objective": ReverseKL}, LoRASpec(rank=2))
        model.student_with_head.student.causal_lm.generation_config.eos_token_id = [5, 63]  # what its template taught
        fit(model, 2, 1, rank, 2, devices=2, strategy=strategy)
        model.export(Path(root) / f"{strategy} LoRA")
        interrupted = {"ckpt_path": f"{root}/{strategy} epochs/epoch=1.ckpt"}
        for name, how in {"whole": {"keep_in": f"{root}/{strategy} epochs"}, "resumed": interrupted}.items():
            rollout = AdaptiveReplay(capacity=6, step=0.5, tolerance=-9.0, sampling=SamplingParams(max_new_tokens=4))
            model = make(teacher, {"objective": TAID, "selector": SpecK, "rollout": rollout})
            trainer = fit(model, 2, 1, rank, 2, epochs=4, devices=2, strategy=strategy, **how)
            trainer.save_checkpoint(f"{root}/{strategy} {name}.ckpt")
            found[f"{strategy} {name}"] = {"history": model.history, "rollout": rollout.state_dict()}
            found[f"{strategy} {name}"]["memory"] = [example.input_ids for example in rollout.memory]
    rows = [{"instruction": f"w{n} w{n + 1}", "output": f"w{n + 2} w{n}"} for n in range(1, 20)]
    data = Path(root) / f"rows{rank}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            f"--run_dir={root}/run",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
            "--trainer.strategy=fsdp2",
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            f"--model.teacher.name={teacher}",
            "--model.student.layers=2",
            f"--data.train={data}",
            f"--data.val={data}",
            "--data.limit_train=8",
            "--data.sampling.max_new_tokens=4",
            "--data.batch_size=2",
        ]
    )
    torch.save(found, f"{root}/rank{rank}.pt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=63,
        eos_token_id=63,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(63)} | {"<end>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, teacher, run_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(distributed_runs, folder, teacher, str(folder))
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_equal_one_with_the_doubled_batch(ranks, teacher, strategy, name):
    settings, accumulate = VARIANTS[name]
    model = make(teacher, settings)
    trainer = fit(model, 4, accumulate)
    folder, found = ranks
    for rank in found:
        assert rank[f"{strategy} {name}"]["steps"] == trainer.global_step == 10 // accumulate + (accumulate > 1)
        for epoch, expected in zip(rank[f"{strategy} {name}"]["history"], model.history, strict=True):
            compared = [key for key in expected if "second" not in key]
            assert [epoch[key] for key in compared] == pytest.approx([expected[key] for key in compared], rel=1e-6)
    saved = torch.load(folder / f"{strategy} {name}.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(saved[key], value, rtol=0, atol=1e-7, msg=lambda text, key=key: f"{key} {text}")
        else:
            assert saved[key] == pytest.approx(value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_exported_student_loads_in_transformers(ranks, strategy):
    folder, _ = ranks
    student = load_causal_lm(str(folder / f"{strategy} FKL"), "float64")
    saved = torch.load(folder / f"{strategy} FKL.ckpt", weights_only=True)["state_dict"]
    assert type(student).__name__ == "LlamaForCausalLM"
    for name, value in student.state_dict().items():
        assert torch.equal(value, saved[f"student_with_head.student.model.{name}"]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_are_merged_into_the_exported_student(ranks, teacher, strategy):
    folder, _ = ranks
    model = make(teacher, {"objective": ReverseKL}, LoRASpec(rank=2))
    fit(model, 4, 1)
    model.export(folder / "LoRA")
    exported, expected = (load_causal_lm(str(folder / name), "float64") for name in (f"{strategy} LoRA", "LoRA"))
    assert exported.generation_config.eos_token_id == [5, 63]
    start = load_causal_lm(teacher, "float64").state_dict()
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-7)
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(exported.state_dict()[moved], start[moved])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resuming_on_two_processes_repeats_the_uninterrupted_run(ranks, strategy):
    folder, found = ranks
    for rank in found:
        whole, resumed = rank[f"{strategy} whole"], rank[f"{strategy} resumed"]
        assert resumed["rollout"] == whole["rollout"]
        for epoch, expected in zip(resumed["history"], whole["history"], strict=True):
            assert [epoch[key] for key in expected if "second" not in key] == [
                expected[key] for key in expected if "second" not in key
            ]
    saved = [torch.load(folder / f"{strategy} {name}.ckpt", weights_only=True) for name in ("whole", "resumed")]
    assert saved[0]["head"] == saved[1]["head"]
    for name, value in saved[0]["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(saved[1]["state_dict"][name], value), name


def test_the_command_runs_sharded_and_one_process_reports(ranks):
    folder, _ = ranks
    assert load_causal_lm(str(folder / "run/student_last")).config.num_hidden_layers == 2
    assert "peak memory" in (folder / "output0").read_text()
    assert "peak memory" not in (folder / "output1").read_text()
    assert (folder / "run/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_students_write_on_both_processes(ranks, strategy):
    _, found = ranks
    first, second = (rank[f"{strategy} on-policy"] for rank in found)
    assert first["steps"] == second["steps"] == 10
    assert first["history"][-1]["kl"] == pytest.approx(second["history"][-1]["kl"], rel=1e-12)
    assert first["history"][-1]["train_loss"] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_process_keeps_its_own_replay_memory(ranks, strategy):
    folder, found = ranks
    memories = [rank[f"{strategy} whole"]["memory"] for rank in found]
    assert len(memories[0]) == len(memories[1]) == 6
    assert memories[0] != memories[1]
    states = torch.load(folder / f"{strategy} whole.ckpt", weights_only=True)["run"]["ranks"]
    assert [[example["input_ids"] for example in state["rollout"]["memory"]] for state in states] == memories
