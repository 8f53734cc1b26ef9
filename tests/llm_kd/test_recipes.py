"""The packaged recipes: published values, and one update of what each describes on a stand-in of its architecture."""

import inspect
import json
from importlib import import_module

import pytest
import torch
import yaml

from kd_common.registry import subclasses
from llm_kd.fit import CONFIG_DIR, build
from llm_kd.objectives import Objective
from llm_kd.selection import Selector

PAIRS = {
    "qwen2_7b_1.5b": ("qwen2", "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-1.5B-Instruct"),
    "gemma2_9b_2b": ("gemma2", "google/gemma-2-9b-it", "google/gemma-2-2b-it"),
    "mistral_7b_danube2_1.8b": ("mistral", "mistralai/Mistral-7B-Instruct-v0.2", "h2oai/h2o-danube2-1.8b-chat"),
    "gpt2_xl_gpt2_dolly": ("gpt2", "openai-community/gpt2-xl", "openai-community/gpt2"),
}
PARTS = sorted(
    str(path.relative_to(CONFIG_DIR).with_suffix(""))
    for kind in ("objectives", "selectors", "rollouts")
    for path in (CONFIG_DIR / kind).glob("*.yaml")
)


def settings_of(name):
    return yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())["model"]["init_args"]


@pytest.fixture
def stand_in(save_model, tmp_path):
    """Arguments that put tiny models and data in the place of a recipe's."""

    def arguments(architecture="llama"):
        rows = [{"instruction": f"Say {n}.", "output": f"{n}, then." * (n % 3 + 1)} for n in range(8)]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [
            f"--model.teacher.name={save_model('teacher', architecture=architecture, vocab=272)}",
            "--model.teacher.dtype=float32",
            f"--model.student.name={save_model('student', architecture=architecture, vocab=264, layers=2)}",
            "--model.student.layers=all",
            f"--data.train={file}",
            f"--data.val={file}",
            "--data.responses=dataset",
            "--data.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.fast_dev_run=2",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.enable_progress_bar=false",
        ]

    return arguments


def step(cli):
    """Two updates, for a warm-up starts at 0, and a validation; the student must move and stay finite."""
    model = cli.model
    before = [p.detach().clone() for p in model.student_with_head.parameters() if p.requires_grad]
    cli.trainer.fit(model, datamodule=cli.datamodule)
    after = [p for p in model.student_with_head.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)
    return model


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.quick("gemma2_9b_2b")
def test_every_pair_takes_a_step_on_its_architecture(stand_in, name):
    architecture, teacher, student = PAIRS[name]
    settings = settings_of(f"pairs/{name}")
    assert (settings["teacher"]["name"], settings["student"]["name"]) == (teacher, student)
    model = step(build([f"--config=pairs/{name}", *stand_in(architecture)]))
    assert model.student_with_head.student.causal_lm.config.model_type == architecture
    assert any("lora_" in name for name, _ in model.student_with_head.named_parameters()) == (architecture != "gpt2")


def test_the_start_for_own_models_takes_a_step(stand_in):
    model = step(build(["--config=pairs/own", *stand_in()]))
    assert model.learning_rate == 2e-5


@pytest.mark.parametrize(
    "file", sorted(f for f in CONFIG_DIR.rglob("*.yaml") if f.parent.name != "compare"), ids=lambda file: file.stem
)
def test_no_recipe_trains_on_a_part_of_the_rows(file):
    """Whatever `default.yaml` says also holds for other people's files."""
    assert "limit_train" not in file.read_text()


def test_the_published_settings():
    for name in ("qwen2_7b_1.5b", "gemma2_9b_2b", "mistral_7b_danube2_1.8b"):
        assert yaml.safe_load((CONFIG_DIR / f"pairs/{name}.yaml").read_text())["trainer"]["max_epochs"] == 2
        assert settings_of(f"pairs/{name}")["student"]["lora"]
    topk = settings_of("selectors/topk")["selector"]["init_args"]
    assert topk == {"k": 5, "beta": 0.01}
    assert settings_of("selectors/speck")["selector"]["init_args"] == topk | {"seed": None}
    dolly = yaml.safe_load((CONFIG_DIR / "pairs/gpt2_xl_gpt2_dolly.yaml").read_text())
    assert dolly["data"]["init_args"]["batch_size"] * dolly["trainer"]["accumulate_grad_batches"] == 32
    assert (dolly["model"]["init_args"]["learning_rate"], dolly["model"]["init_args"]["weight_decay"]) == (5e-4, 0.01)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.quick("selectors/speck", "rollouts/mixed", "objectives/rkl")
def test_every_part_takes_a_step(stand_in, name):
    sampling = ["--model.rollout.sampling.max_new_tokens=3"] if "policy" in name or "mixed" in name else []
    step(build([f"--config={name}", *stand_in(), *(sampling if "off" not in name else [])]))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_states_every_setting_of_its_class(name):
    """A class block without a setting would inherit it from the class it replaces."""
    block = next(value for value in settings_of(name).values() if isinstance(value, dict))
    module, _, cls = block["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), cls)).parameters.values()
    named = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert set(block.get("init_args", {})) == named


def test_every_objective_and_selector_has_a_recipe():
    blocks = [block for name in PARTS for block in settings_of(name).values() if isinstance(block, dict)]
    chosen = {block["class_path"] for block in blocks if "class_path" in block}
    for cls in [*subclasses(Objective).values(), *subclasses(Selector).values()]:
        assert f"{cls.__module__}.{cls.__name__}" in chosen


@pytest.mark.parametrize("file", ["smollm2", "selection", "gsm8k"])
def test_the_comparisons_name_packaged_parts(file):
    comparison = yaml.safe_load((CONFIG_DIR / f"compare/{file}.yaml").read_text())
    for name in {entry for entries in comparison["variants"].values() for entry in entries}:
        assert name in PARTS
