"""The exported EAGLE-3 head, computed from its files alone as the EAGLE-3 code does, gives the drafter's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spec_decode.drafters import Eagle3, Medusa, save_drafter
from spec_decode.export import eagle3_layout, export
from spec_decode.models.target import TargetSpec


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x, theta, positions):
    """Rotary embedding of (T, heads, d), pairs (i, i + d / 2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def eagle3_steps(weights, config, embeddings, features):
    """Logits of the first two steps of the head on a sequence: embeddings of the next tokens (T, h), features (T, 3h).

    The query of the second step at row p sees the keys of the first up to row p and its own.
    """
    heads, kv, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    w = lambda name: weights[f"{name}.weight"]  # noqa: E731
    m, size = "midlayer.", len(embeddings)
    keys, values, logits, g = [], [], [], features @ w("fc").T
    for step in range(2):
        rows = size - step
        g, e = g[:rows], embeddings[step:]
        x = torch.cat([rms(e, w(m + "input_layernorm"), eps), rms(g, w(m + "hidden_norm"), eps)], -1)
        q, k, v = (
            (x @ w(f"{m}self_attn.{p}_proj").T).unflatten(-1, (n, -1)) for p, n in (("q", heads), ("k", kv), ("v", kv))
        )
        positions = step + torch.arange(rows)
        q, k = rope(q, config["rope_theta"], positions), rope(k, config["rope_theta"], positions)
        keys.append(k.repeat_interleave(heads // kv, dim=1))
        values.append(v.repeat_interleave(heads // kv, dim=1))
        seen = [torch.ones(rows, size).tril().bool(), *[torch.eye(rows, size - 1).bool()] * step]
        scores = torch.einsum("qhd,khd->hqk", q, torch.cat(keys)) * q.shape[-1] ** -0.5
        distributions = scores.masked_fill(~torch.cat(seen, 1), -torch.inf).softmax(-1)
        context = torch.einsum("hqk,khd->qhd", distributions, torch.cat(values)).flatten(1)
        g = g + context @ w(m + "self_attn.o_proj").T
        y = rms(g, w(m + "post_attention_layernorm"), eps)
        gate = y @ w(m + "mlp.gate_proj").T
        g = g + (gate * gate.sigmoid() * (y @ w(m + "mlp.up_proj").T)) @ w(m + "mlp.down_proj").T
        logits.append(rms(g, w("norm"), eps) @ w("lm_head").T)
    return logits


def saved(tiny, byte_tokenizer, folder, kind="Llama", *, draft_vocab=None, layers=7, feature_layers=None, **changes):
    """A target and an EAGLE-3 drafter for it, in folders."""
    made = tiny.make(kind=kind, **({"vocab_size": 258, "num_hidden_layers": layers} | changes))
    made.save_pretrained(folder / "target")
    byte_tokenizer.save_pretrained(folder / "target")
    target = TargetSpec(str(folder / "target"), "float32", feature_layers).load()
    drafter = Eagle3(depth=2, draft_vocab=draft_vocab).bind(target).eval().requires_grad_(False)
    if draft_vocab:
        drafter.use_vocabulary(torch.arange(258)[3::5][:draft_vocab])
    save_drafter(drafter, folder / "drafter", {"target": str(folder / "target")})
    return target, drafter


@pytest.mark.parametrize(
    ("kind", "draft_vocab"), [("Llama", None), ("Llama", 50), ("Qwen2", 50), ("Qwen3", None), ("Mistral", None)]
)
def test_exported_head(tiny, byte_tokenizer, tmp_path, kind, draft_vocab):
    """Targets with biases and norms of queries and keys, too: engines take no notice of them, or refuse them."""
    target, drafter = saved(tiny, byte_tokenizer, tmp_path, kind, draft_vocab=draft_vocab)
    ids = torch.arange(258) if draft_vocab is None else torch.arange(3, 253, 5)
    export(str(tmp_path / "drafter"), str(tmp_path / "out"), "float32")
    weights = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["draft_vocab_size"] == len(ids)
    assert not any(config[name] for name in ("attention_bias", "mlp_bias", "norm_before_residual", "norm_output"))
    assert torch.equal(weights["d2t"] + torch.arange(len(ids)), ids)
    assert torch.equal(weights["t2d"].nonzero().flatten(), ids)
    assert len(weights) == 15
    assert not any("bias" in name or "q_norm" in name or "k_norm" in name for name in weights)

    tokens = torch.randint(258, (1, 9))
    states = target(tokens)
    levels = drafter.level_states(tokens, states)
    found = eagle3_steps(weights, config, target.embed_tokens(tokens[0, 1:]), states.features[0, :-1])
    for level, logits in enumerate(found):
        torch.testing.assert_close(logits, drafter.level_logits(level, levels[level])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_layers": (0, 1, 2)}, r"reads the layers \[0, 1, 2\]; the EAGLE-3 layout implies \(2, 3, 4\)"),
        ({"layers": 6}, r"\(2, 3, 3\) of a target of 6 layers"),
        ({"layers": 4}, r"\(2, 2, 2\) of a target of 4 layers"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ],
)
def test_what_engines_would_draft_wrongly_with_is_refused(tiny, byte_tokenizer, tmp_path, changes, message):
    saved(tiny, byte_tokenizer, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "drafter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_target_that_was_replaced_is_refused(tiny, byte_tokenizer, tmp_path):
    saved(tiny, byte_tokenizer, tmp_path)
    tiny.make(vocab_size=300, num_hidden_layers=7).save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="vocab_size 300 instead of 258"):
        export(str(tmp_path / "drafter"), str(tmp_path / "out"))


@pytest.mark.parametrize("change", ["left over", "missing", "not finite"])
def test_weights_that_do_not_make_the_layout_are_refused(tiny, byte_tokenizer, tmp_path, change):
    _, drafter = saved(tiny, byte_tokenizer, tmp_path)
    state = drafter.state_dict()
    if change == "left over":
        state["layer.self_attn.q_proj.bias"] = torch.zeros(32)
    elif change == "missing":
        del state["layer.self_attn.q_proj.weight"]
    else:
        state["layer.self_attn.q_proj.weight"] = torch.full((32, 64), 1e6)
    with pytest.raises(ValueError, match=r"midlayer\.self_attn\.q_proj"):
        eagle3_layout(state, 258, torch.float16)


def test_other_drafters_are_refused(standin, tmp_path):
    target = TargetSpec(str(standin), "float32").load()
    save_drafter(Medusa(depth=1).bind(target), tmp_path / "medusa", {"target": str(standin)})
    with pytest.raises(ValueError, match="is a Medusa drafter"):
        export(str(tmp_path / "medusa"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds no drafter"):
        export(str(tmp_path), str(tmp_path / "out"))
