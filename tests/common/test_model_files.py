"""Loading is whole or refused: tensors that are missing, left over, renamed, of another kind, or there twice."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kd_common.hub import language_models as hub
from kd_common.hub.language_models import load_causal_lm, load_config
from kd_common.hub.weight_files import ModelFilesError, not_finite

TOKENS = torch.arange(8)[None]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def llama(**settings):
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def folder(model, tmp_path):
    with hub.quiet():
        model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = change(load_file(file))
    save_file({name: tensor.clone() for name, tensor in state.items()}, file, metadata={"format": "pt"})


@torch.no_grad()
def assert_same(loaded, model):
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('layers.1.', 'layers.1._fsdp_wrapped_module.')}",
        lambda name: name.replace("model.layers.", "model.layers._orig_mod."),
        lambda name: re.sub(r"layers\.(\d)", r"layers.\1._checkpoint_wrapped_module", name),
    ],
)
def test_names_of_wrapped_models_are_understood(folder, model, rename):
    rewrite(folder, lambda state: {rename(name): tensor for name, tensor in state.items()})
    loaded = load_causal_lm(str(folder))
    assert_same(loaded, model)
    with hub.quiet():
        loaded.save_pretrained(folder / "again")
    assert load_file(folder / "again" / "model.safetensors").keys() == model.state_dict().keys()


def test_an_averaged_model_is_understood(folder, model):
    averaged = AveragedModel(model)
    rewrite(folder, lambda _: dict(averaged.state_dict()))
    assert_same(load_causal_lm(str(folder)), model)


@pytest.mark.parametrize("tied_file", ["safetensors", "bin"])
def test_tied_weights_are_stored_once(tmp_path, tied_file):
    tied = llama(tie_word_embeddings=True)
    with hub.quiet():
        tied.save_pretrained(tmp_path)
    if tied_file == "bin":
        torch.save(tied.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    loaded = load_causal_lm(str(tmp_path))
    assert_same(loaded, tied)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_buffers_of_older_versions_are_no_left_overs(tmp_path):
    """GPT-2's files of before 2023 hold the causal mask of every layer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    with hub.quiet():
        model.save_pretrained(tmp_path)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool) for layer in range(2)}
    rewrite(tmp_path, lambda state: state | masks)
    assert_same(load_causal_lm(str(tmp_path)), model)


def without(part):
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def replaced(name, change):
    return lambda state: state | {name: change(state[name])}


def first_entry(value):
    def change(tensor):
        changed = tensor.clone()
        changed.flatten()[-1] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("layers.1."), r"9 missing.*model\.layers\.1\.input_layernorm\.weight.* and 5 more"),
        (without("lm_head"), r"1 missing.*lm_head\.weight"),
        (without("model.norm"), r"1 missing.*model\.norm\.weight"),
        (lambda state: {f"wrapper.{name}": tensor for name, tensor in state.items()}, r"missing.*left over.*wrapper"),
        (lambda state: state | {"v_head.weight": torch.ones(1, 16)}, r"1 left over \(v_head\.weight\)"),
        (replaced(Q_PROJ, lambda tensor: tensor[:8]), rf"1 of another shape \({Q_PROJ} \(8, 16\)"),
        (replaced(Q_PROJ, lambda tensor: tensor[:0]), rf"1 of another shape \({Q_PROJ} \(0, 16\)"),
        (replaced("lm_head.weight", lambda tensor: tensor[:30]), r"lm_head\.weight \(30, 16\) instead of \(32, 16\)"),
        (replaced(Q_PROJ, first_entry(float("nan"))), rf"1 not finite.*{Q_PROJ}"),
        (replaced("model.norm.weight", first_entry(-float("inf"))), r"1 not finite.*model\.norm\.weight"),
        (replaced(Q_PROJ, lambda tensor: tensor.to(torch.complex64)), rf"1 tensors are complex.*\({Q_PROJ} C64"),
        (replaced(Q_PROJ, lambda tensor: (100 * tensor).to(torch.int8)), rf"1 not of real numbers \({Q_PROJ} I8"),
        (replaced(Q_PROJ, lambda tensor: tensor > 0), rf"1 not of real numbers \({Q_PROJ} BOOL"),
    ],
)
def test_what_is_not_whole_is_refused_by_its_tensors(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(ModelFilesError, match=told) as error:
        load_causal_lm(str(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensor: torch.empty_like(tensor, device="meta"), rf"without values \({Q_PROJ} meta"),
        (lambda tensor: tensor.to(torch.complex64), rf"complex.*\({Q_PROJ} torch\.complex64"),
    ],
)
def test_a_pickled_file_is_held_to_the_same(folder, model, change, told):
    (folder / "model.safetensors").unlink()
    torch.save(replaced(Q_PROJ, change)(model.state_dict()), folder / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=told):
        load_causal_lm(str(folder))


def test_what_overflows_in_the_asked_precision_is_not_finite(folder):
    rewrite(folder, replaced(Q_PROJ, first_entry(1e5)))
    load_causal_lm(str(folder))
    with pytest.raises(ModelFilesError, match=rf"not finite as torch\.float16 \({Q_PROJ}"):
        load_causal_lm(str(folder), "float16")


def test_large_finite_weights_whose_sum_overflows_are_finite():
    big = torch.full((4,), 3e38)
    assert not big.sum().isfinite()
    assert not_finite({"big": big, "half": torch.full((99,), 6e4, dtype=torch.float16)}) == []
    assert not_finite({"both": torch.tensor([float("inf"), -float("inf")])}) == ["both"]


@pytest.fixture
def sharded(model, tmp_path):
    with hub.quiet():
        model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    return tmp_path / "sharded", shards


def test_shards_make_the_same_model(sharded, model):
    assert_same(load_causal_lm(str(sharded[0])), model)


def test_a_missing_shard_is_named(sharded):
    folder, shards = sharded
    shards[1].unlink()
    with pytest.raises(ModelFilesError, match=f"1 files that are missing \\({shards[1].name}"):
        load_causal_lm(str(folder))


def test_a_shard_that_the_index_does_not_list_is_named(sharded):
    folder, shards = sharded
    left = folder / "model-00009-of-00009.safetensors"
    shutil.copy(shards[0], left)
    with pytest.raises(ModelFilesError, match=f"left over \\({left.name}"):
        load_causal_lm(str(folder))


def test_a_tensor_in_two_shards_is_named(sharded):
    folder, shards = sharded
    one, other = load_file(shards[0]), load_file(shards[1])
    name = next(iter(one))
    save_file(other | {name: one[name] + 1}, shards[1], metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match=f"two shards \\({re.escape(name)}"):
        load_causal_lm(str(folder))


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    folder, shards = sharded
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelFilesError, match=r"no shard holds \(ghost\.weight"):
        load_causal_lm(str(folder))


def test_two_sets_of_weights_must_be_the_same_model(folder, model):
    torch.save(model.to(torch.float16).state_dict(), folder / "pytorch_model.bin")  # a rounded copy of the same
    load_causal_lm(str(folder))
    other = replaced(Q_PROJ, lambda tensor: tensor + 0.01)(model.state_dict())
    torch.save(other, folder / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=f"two models: {Q_PROJ} .*model.safetensors and pytorch_model.bin"):
        load_causal_lm(str(folder))


def test_an_older_sharded_save_beside_a_single_file_is_another_model(sharded, model):
    folder, _ = sharded
    single = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(single, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match="two models"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_refused_with_its_base_and_the_remedy_works(folder, model, tmp_path, beside_a_model, monkeypatch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        load_causal_lm(str(folder)), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapter = tmp_path / "adapter"
    with hub.quiet():
        adapted.save_pretrained(adapter)
    if beside_a_model:
        shutil.copytree(folder, adapter, dirs_exist_ok=True)
    for load in (load_causal_lm, load_config, hub.load_tokenizer):
        with pytest.raises(
            ModelFilesError, match=rf"adapter \(LORA\) for the base model {folder}.*merge_and_unload"
        ) as error:
            load(str(adapter))
        told = str(error.value)
    code = re.search(r'python -c "(.*?)",', told)
    monkeypatch.chdir(tmp_path)
    with hub.quiet():
        exec(code[1])
        merged = load_causal_lm("MERGED")
        with torch.no_grad():
            torch.testing.assert_close(merged(TOKENS).logits, adapted(TOKENS).logits)
            assert not torch.allclose(merged(TOKENS).logits, model(TOKENS).logits)


def test_a_base_model_without_head_is_refused(tmp_path, model):
    with hub.quiet():
        model.model.save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers draws the head at random
    with pytest.raises(ModelFilesError, match=r"1 missing.*lm_head\.weight"):
        load_causal_lm(str(tmp_path))


def test_a_quantised_model_without_its_library_says_so(folder):
    config = folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantised))
    with pytest.raises(ModelFilesError, match=r"(?i)quantised.*gptq"):
        load_causal_lm(str(folder))
