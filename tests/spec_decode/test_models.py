"""The step runner against transformers, per architecture: whole sequences, prefill, trees, commits, windows."""

import pytest
import torch
import transformers as hf

from spec_decode.decoding.tree import ancestor_mask, backbone_parents, pad_tree, paths, positions
from spec_decode.models import CausalLM
from spec_decode.models.causal_lm import default_feature_layers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama tied, biases": lambda: hf.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama 3": lambda: hf.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama yarn": lambda: hf.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "mistral window": lambda: hf.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen2 window": lambda: hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def tiny(config):
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # transformers starts from 0.02, norms of 1 and biases of 0, which would hide mistakes
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A random transformers model and the runner on its weights."""
    model = tiny(CONFIGS[request.param]())
    return model, CausalLM.from_transformers(model)


def ragged(*lengths, vocab=61):
    tokens = torch.full((len(lengths), max(lengths)), -1)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(vocab, (length,))
    return tokens, torch.tensor(lengths)


@torch.no_grad()
def reference(model, tokens):
    """Logits, and inputs of every layer plus the last layer's normalised output, of one unpadded sequence."""
    out = model(tokens.unsqueeze(0), output_hidden_states=True, use_cache=False)
    return out.logits[0], [h[0] for h in out.hidden_states]


def test_whole_sequences_and_features(pair):
    model, runner = pair
    tokens, counts = ragged(19, 11)
    states = runner(tokens.clamp(min=0))
    for row, count in enumerate(counts.tolist()):
        logits, hidden = reference(model, tokens[row, :count])
        torch.testing.assert_close(runner.logits(states.final[row, :count]), logits, **CLOSE)
        torch.testing.assert_close(states.final[row, :count], hidden[-1], **CLOSE)
        wanted = torch.cat([hidden[i] for i in runner.feature_layers], dim=-1)
        torch.testing.assert_close(states.features[row, :count], wanted, **CLOSE)


def test_prefill_of_rows_of_different_lengths_in_chunks(pair):
    model, runner = pair
    tokens, counts = ragged(20, 9, 1)
    cache = runner.new_cache(3, 32)
    states = runner.prefill(tokens, counts, cache, chunk=8)
    assert cache.lengths.tolist() == [20, 9, 1]
    for row, count in enumerate(counts.tolist()):
        expected, _ = reference(model, tokens[row, :count])
        torch.testing.assert_close(runner.logits(states.final[row, :count]), expected, **CLOSE)


def test_plain_steps(pair):
    model, runner = pair
    tokens, counts = ragged(12, 7)
    cache = runner.new_cache(2, 32)
    runner.prefill(tokens, counts, cache)
    more = torch.randint(61, (2, 5))
    for i in range(5):
        states = runner.extend(more[:, i : i + 1], torch.ones(2, dtype=torch.int64), cache)
        for row in range(2):
            expected, _ = reference(model, torch.cat([tokens[row, : counts[row]], more[row, : i + 1]]))
            torch.testing.assert_close(runner.logits(states.final[row, 0]), expected[-1], **CLOSE)


def test_tree_step_equals_each_path_on_its_own(pair, toy):
    model, runner = pair
    tokens, counts = ragged(15, 6)
    cache = runner.new_cache(2, 40)
    runner.prefill(tokens, counts, cache)
    tree = pad_tree(toy.random_tree(2, 11, 61, torch.Generator().manual_seed(1), torch.tensor([4, 5])))
    logits, states = runner.tree_logits(tree, cache)
    assert cache.lengths.tolist() == [15, 6]
    mask = ancestor_mask(tree.parents)
    checked = 0
    for row, node in tree.present.nonzero().tolist():
        path = mask[row, node].nonzero().squeeze(1)
        expected, hidden = reference(model, torch.cat([tokens[row, : counts[row]], tree.tokens[row, path]]))
        torch.testing.assert_close(logits[row, node], expected[-1], **CLOSE)
        features = torch.cat([hidden[i][-1] for i in runner.feature_layers])
        torch.testing.assert_close(states.features[row, node], features, **CLOSE)
        checked += 1
    assert checked > 12
    assert positions(tree.parents, counts).max() > counts.max() + 1


def test_cache_after_commit_equals_a_fresh_prefill(pair, toy):
    """Random paths, also ones that end at once and ones that are cut; then a second tree."""
    _, runner = pair
    generator = torch.Generator().manual_seed(2)
    tokens, counts = ragged(10, 4, 7)
    cache = runner.new_cache(3, 64)
    runner.prefill(tokens, counts, cache)
    texts = [tokens[row, :count].tolist() for row, count in enumerate(counts.tolist())]
    moved = 0
    for _ in range(3):
        tree = toy.random_tree(3, 16, 61, generator, torch.randint(61, (3,), generator=generator))
        runner.tree_logits(tree, cache)
        mask, accepted = ancestor_mask(tree.parents), torch.full((3, 16), -1)
        kept = torch.zeros(3, dtype=torch.int64)
        for row in range(3):
            deepest = int(mask[row].sum(-1).argmax())
            path = mask[row, deepest].nonzero().squeeze(1)
            accepted[row, : len(path)] = path
            kept[row] = len(path) - (row == 1)
            texts[row] += tree.tokens[row, path[: kept[row]]].tolist()
            moved += int((path[: kept[row]] != torch.arange(kept[row])).sum())
        cache.commit(accepted, kept)
    assert moved
    assert cache.lengths.tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        fresh = runner.new_cache(1, 64)
        runner.prefill(torch.tensor([text]), torch.tensor([len(text)]), fresh)
        for kept_rows, expected in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            torch.testing.assert_close(kept_rows[:, row, :, : len(text)], expected[:, 0, :, : len(text)], **CLOSE)


def test_backbone_first_trees_move_at_most_one_row():
    """The order of the nodes is what makes a commit cheap."""
    parents = backbone_parents((3, 2, 2)).unsqueeze(0)
    for path in paths(parents)[0]:
        path = path[path >= 0]
        assert int((path != torch.arange(len(path))).sum()) <= 1


def test_finished_rows_and_garbage_behind_the_length_change_nothing(pair):
    _, runner = pair
    tokens, counts = ragged(9, 5)
    clean, dirty = runner.new_cache(2, 48), runner.new_cache(2, 48)
    for cache in (clean, dirty):
        runner.prefill(tokens, counts, cache)
    runner.step(torch.randint(61, (2, 16)), dirty)
    nxt = torch.randint(61, (2, 1))
    assert torch.equal(runner.step(nxt, clean).final, runner.step(nxt, dirty).final)
    dirty.commit(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 1]))
    assert dirty.lengths.tolist() == [9, 6]


def test_weights_are_shared_not_copied():
    model = tiny(CONFIGS["llama"]())
    runner = CausalLM.from_transformers(model)
    assert runner.layers[1].mlp.up_proj.weight.data_ptr() == model.model.layers[1].mlp.up_proj.weight.data_ptr()
    tied = tiny(CONFIGS["llama tied, biases"]())
    runner = CausalLM.from_transformers(tied)
    assert runner.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in runner.parameters()) == sum(p.numel() for p in tied.parameters())
    moved = runner.to(torch.float64)
    assert moved.lm_head.weight is moved.embed_tokens.weight
    assert not any(p.requires_grad for p in runner.parameters())
    assert not runner.training


def test_bf16_is_close_to_fp32():
    model = tiny(CONFIGS["qwen3"]())
    full = CausalLM.from_transformers(model)(torch.arange(20).unsqueeze(0)).final
    half_runner = CausalLM.from_transformers(model.to(torch.bfloat16))
    half = half_runner(torch.arange(20).unsqueeze(0)).final
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.15)


def test_fingerprint_tells_targets_apart_but_not_their_dtype():
    model = tiny(CONFIGS["llama"]())
    runner = CausalLM.from_transformers(model)
    print_of = runner.fingerprint()
    assert CausalLM.from_transformers(model, feature_layers=(0, 1, 2)).fingerprint() != print_of
    half = CausalLM.from_transformers(tiny(CONFIGS["llama"]()).to(torch.bfloat16))
    assert half.fingerprint() == half.fingerprint(torch.bfloat16) == print_of
    assert runner.fingerprint(torch.float32) not in (print_of, half.fingerprint(torch.float32))
    with torch.no_grad():
        half.norm.weight[0] += 0.5
    assert half.fingerprint() != print_of


def test_every_weight_counts_in_the_fingerprint():
    """Also one of thousands, also by less than bfloat16 can tell where nothing is rounded."""
    runner = CausalLM.from_transformers(tiny(CONFIGS["llama"]()))
    seen = {runner.fingerprint(torch.float32)}
    for index, (name, value) in enumerate(sorted(runner.state_dict().items()), start=1):
        place = (7919 * index) % value.numel()
        value.view(-1)[place] *= 1 + 1e-5
        seen.add(runner.fingerprint(torch.float32))
        assert len(seen) == index + 1, name
    rounded = runner.fingerprint()
    with torch.no_grad():
        runner.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    assert runner.fingerprint() != rounded


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ],
)
def test_settings_without_weights_count_in_the_fingerprint(changes):
    models = [hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **extra)) for extra in ({}, changes)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (CausalLM.from_transformers(model) for model in models)
    assert first.fingerprint() != second.fingerprint()


def test_a_sliding_window_counts_in_the_fingerprint():
    models = [hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=size)) for size in (8, 16)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (CausalLM.from_transformers(model) for model in models)
    assert first.fingerprint() != second.fingerprint()


def test_default_feature_layers():
    assert default_feature_layers(30) == (2, 15, 27)
    assert default_feature_layers(32) == (2, 16, 29)
    assert all(0 <= i <= n for n in range(1, 6) for i in default_feature_layers(n))


# --- bad input ---


def test_unsupported_models_are_refused():
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        CausalLM.from_transformers(gpt2)
    dynamic = hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        CausalLM.from_transformers(hf.LlamaForCausalLM(dynamic))
    with pytest.raises(ValueError, match=r"feature_layers must lie in \[0, 3\]"):
        CausalLM.from_transformers(tiny(CONFIGS["llama"]()), feature_layers=(0, 1, 4))


def test_a_full_cache_is_refused_before_it_is_written():
    runner = CausalLM.from_transformers(tiny(CONFIGS["llama"]()))
    cache = runner.new_cache(1, 8)
    runner.prefill(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([6]), cache)
    with pytest.raises(ValueError, match="3 nodes behind 6 cached tokens exceed the cache's 8 slots"):
        runner.step(torch.zeros(1, 3, dtype=torch.int64), cache)
