"""What is tried on a loaded model, over architectures: packing, the head, and layers at their new places."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from kd_common.hub.language_models import quiet
from llm_kd.models import Backbone, check_packing, depth_prune
from llm_kd.models.backbone import make_savable
from llm_kd.models.prune import relisted

LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
SETTINGS = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 4, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "attention_window_size": 64},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
}


def tiny(kind, **more):
    """A random model of 4 layers whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    shared = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shared | SETTINGS.get(kind, {}) | more)))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2", "gpt2", "smollm3", "mixtral"])
def test_packing_passes_where_conversations_are_kept_apart(kind, dtype):
    check_packing(Backbone(tiny(kind).to(dtype)), "student")


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["gpt_oss", "opt", "bloom", "lfm2", "qwen3_next", "qwen3_5_text", "falcon_h1", "mamba2"]
)
def test_packing_is_refused_where_they_would_see_each_other(kind, dtype):
    with pytest.raises(ValueError, match=r"data\.packing.*teacher.*data\.packing to false"):
        check_packing(Backbone(tiny(kind).to(dtype)), "teacher")


def test_the_modes_of_a_tried_model_stay():
    backbone = Backbone(tiny("llama")).train()
    check_packing(backbone, "student")
    assert all(module.training for module in backbone.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["granite", "cohere", "recurrent_gemma"])
def test_heads_that_scale_or_cap_in_their_own_way_are_refused(kind):
    """RecurrentGemma caps at 30 under a name of its own; Granite and Cohere scale."""
    more = {"granite": {"logits_scaling": 1.01}, "cohere": {"logit_scale": 0.99}}.get(kind, {})
    with pytest.raises(ValueError, match="turns hidden states into logits in a way"):
        Backbone(tiny(kind, **more))


@pytest.mark.parametrize("cap", [30.0, 1000.0])
def test_a_cap_of_another_name_shows_however_small_the_logits_are(cap):
    model = tiny("llama")
    torch.nn.init.normal_(model.lm_head.weight, std=1e-4)
    model.lm_head.register_forward_hook(lambda _, inputs, logits: cap * torch.tanh(logits / cap))
    with pytest.raises(ValueError, match="turns hidden states into logits in a way"):
        Backbone(model)


def kept_in_place(model, kept):
    """Logits of a model whose other layers pass on what they get."""
    layers = model.model.layers
    for place, layer in enumerate(layers):
        if place not in kept:
            layer.forward = lambda hidden_states, **_: hidden_states
    return model(torch.arange(9)[None], use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}),
        ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}),
        ("llama4_text", {}),
        ("llama4_text", {"moe_layers": [0, 3], "no_rope_layers": [0, 1, 1, 0]}),
        ("qwen2_moe", {"mlp_only_layers": [1, 3]}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
        ("gemma2", {"sliding_window": 2}),
    ],
)
@pytest.mark.parametrize("keep", [2, 3])
def test_what_is_listed_per_layer_follows_the_layers(kind, more, keep, tmp_path):
    model = tiny(kind, **more)
    pruned = depth_prune(model, keep)
    expected = kept_in_place(model, {2: (0, 3), 3: (0, 2, 3)}[keep])
    with quiet():
        pruned.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=pruned.config._attn_implementation)
    for student in (pruned, again):
        torch.testing.assert_close(student(torch.arange(9)[None]).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_compute_otherwise_at_their_new_place_are_refused():
    """GPT-2 may divide attention by the number of the layer, which no list says."""
    with pytest.raises(ValueError, match=r"student\.layers 2.*GPT2LMHeadModel"):
        depth_prune(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), 2)


@pytest.mark.filterwarnings("ignore")
def test_kinds_of_layers_that_no_list_tells_apart_are_refused():
    with pytest.raises(ValueError, match=r"student\.layers 3.*RecurrentGemma.*several kinds"):
        depth_prune(tiny("recurrent_gemma"), 3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "d"]),
        ("no_rope_layers", [1, 1, 1, 0], [1, 0]),
        ("moe_layers", [1, 3], [1]),
        ("moe_layers", [0, 1, 2, 3], [0, 1]),
        ("mlp_only_layers", [], []),
        ("activation_sparsity_pattern", [0.9, 0.5, 0.0, 0.0], [0.9, 0.0]),
        ("eos_token_id", [1, 2, 3, 4], None),
        ("mrope_section", [1, 2, 3], None),
        ("hidden_act", "silu", None),
    ],
)
def test_lists_of_layers(name, value, expected):
    assert relisted(name, value, [0, 3], 4) == expected


@pytest.mark.parametrize(
    "odd",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.0, "top_k": 1},
        {"min_p": 0.1, "typical_p": 0.5},
        {"length_penalty": 2.0, "early_stopping": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.1, "suppress_tokens": [3], "eos_token_id": [1, 2]},
    ],
)
def test_settings_of_generation_can_be_saved_again(odd, tmp_path):
    settings = GenerationConfig(**odd)
    make_savable(settings, "student")
    settings.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path)
    for name in ("do_sample", "repetition_penalty", "suppress_tokens", "eos_token_id"):
        assert getattr(kept, name) == odd.get(name)
    assert kept.temperature == (0.7 if odd.get("do_sample") else None)


def test_settings_of_generation_that_contradict_themselves_are_refused():
    settings = GenerationConfig()
    settings.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"student: generation_config\.json.*num_return_sequences"):
        make_savable(settings, "student")
