"""The exported EAGLE-3 head, computed from its files alone as the EAGLE-3 code does, gives the drafter's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spec_decode.drafters import DrafterSpec, save_drafter
from spec_decode.export import export
from spec_decode.target import TargetSpec


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x, theta):
    """Rotary embedding of (T, heads, d), pairs (i, i + d / 2)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def eagle3_logits(weights, config, embeddings, features):
    """First step of the head on a sequence: embeddings of the next tokens (T, h), features (T, 3h)."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    w = lambda name: weights[f"{name}.weight"]  # noqa: E731
    g, eps = features @ w("fc").T, config["rms_norm_eps"]
    m = "midlayer."
    x = torch.cat([rms(embeddings, w(m + "input_layernorm"), eps), rms(g, w(m + "hidden_norm"), eps)], -1)
    q, k, v = (
        (x @ w(f"{m}self_attn.{p}_proj").T).unflatten(-1, (n, -1)) for p, n in (("q", heads), ("k", kv), ("v", kv))
    )
    q, k = rope(q, config["rope_theta"]), rope(k, config["rope_theta"])
    k, v = (y.repeat_interleave(heads // kv, dim=1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    mask = torch.ones(len(x), len(x)).triu(1).bool()
    context = torch.einsum("hqk,khd->qhd", scores.masked_fill(mask, -torch.inf).softmax(-1), v).flatten(1)
    g = g + context @ w(m + "self_attn.o_proj").T
    y = rms(g, w(m + "post_attention_layernorm"), eps)
    gate = y @ w(m + "mlp.gate_proj").T
    g = g + (gate * gate.sigmoid() * (y @ w(m + "mlp.up_proj").T)) @ w(m + "mlp.down_proj").T
    return rms(g, w("norm"), eps) @ w("lm_head").T


@pytest.mark.parametrize("draft_vocab", [None, 50])
def test_exported_head(standin, tmp_path, draft_vocab):
    target = TargetSpec(str(standin), "float32").load()
    spec = DrafterSpec("eagle3", {"depth": 2, "draft_vocab": draft_vocab})
    drafter = spec.build(target).eval().requires_grad_(False)
    ids = torch.arange(258)
    if draft_vocab:
        ids = torch.arange(3, 253, 5)
        drafter.use_vocabulary(ids)
    save_drafter(drafter, spec, tmp_path / "drafter", {"target": str(standin)})
    export(str(tmp_path / "drafter"), str(tmp_path / "out"), "float32")
    weights = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["draft_vocab_size"] == len(ids)
    assert torch.equal(weights["d2t"] + torch.arange(len(ids)), ids)
    assert torch.equal(weights["t2d"].nonzero().flatten(), ids)

    tokens = torch.randint(258, (1, 9))
    states = target(tokens)
    expected = drafter.level_logits(0, drafter.level_states(tokens, states)[0])[0]
    found = eagle3_logits(weights, config, target.embed_tokens(tokens[0, 1:]), states.features[0, :-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_drafters_and_layers_are_refused(standin, tmp_path):
    target = TargetSpec(str(standin), "float32").load()
    for name, message in (("medusa", "is a medusa drafter"), ("eagle3", "the EAGLE-3 layout implies")):
        spec = DrafterSpec(name, {"depth": 1})
        if name == "eagle3":
            target = TargetSpec(str(standin), "float32", feature_layers=(0, 1, 2)).load()
        save_drafter(spec.build(target), spec, tmp_path / name, {"target": str(standin)})
        with pytest.raises(ValueError, match=message):
            export(str(tmp_path / name), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="holds no drafter"):
        export(str(tmp_path), str(tmp_path / "out"))
