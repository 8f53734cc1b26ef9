"""Tiny stand-ins: random models of every architecture the recipes use."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kd_common.hub.language_models import quiet


def tiny_model(architecture="llama", *, layers=3, hidden=32, vocab=258, seed=0, **settings):
    """A random causal language model; ``hidden`` must be a multiple of 16."""
    torch.manual_seed(seed)
    shared = {"vocab_size": vocab, "pad_token_id": 257, "eos_token_id": 257, "bos_token_id": None, **settings}
    if architecture == "gpt2":
        config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=2, **{"n_positions": 512, **shared})
        return GPT2LMHeadModel(config).eval()
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }
    config_class, model_class = classes[architecture]
    if architecture == "gemma2":
        shared |= {"head_dim": hidden // 2, "attn_implementation": "eager"}
    config = config_class(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"max_position_embeddings": 512, **shared},
    )
    return model_class(config).eval()


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer):
    """The byte tokenizer."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def make_model():
    """:func:`tiny_model`, for tests that cannot import a conftest."""
    return tiny_model


@pytest.fixture
def save_model(tmp_path, tokenizer):
    """Save a tiny model with the tokenizer and return the folder."""

    def save(name="teacher", **settings):
        folder = tmp_path / name
        with quiet():
            tiny_model(**settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save
