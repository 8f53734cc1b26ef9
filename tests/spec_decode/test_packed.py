"""Packed weights are the plain ones in another layout."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kd_common.run.memory import peak_bytes
from spec_decode import drafters
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.drafters.files import for_inference
from spec_decode.models import CausalLM
from spec_decode.models.packed import FusedLinear, PackedLinear, pack_linears, packable

needs_bfloat16 = pytest.mark.skipif(
    not packable(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="this CPU has no kernels for packed bfloat16 weights"
)


def make(dtype: torch.dtype) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, **sizes)
    return CausalLM.from_transformers(LlamaForCausalLM(config).to(dtype))


@needs_bfloat16
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 5), (3, 8), (70,)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_weight(rows, bias):
    torch.manual_seed(0)
    plain = nn.Linear(96, 40, bias=bias).bfloat16().requires_grad_(False)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(*rows, 96, dtype=torch.bfloat16)
    expected = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    found = packed(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    assert torch.equal(packed.weight, plain.weight)
    assert {k: v.tolist() for k, v in packed.state_dict().items()} == {
        k: v.tolist() for k, v in plain.state_dict().items()
    }


@needs_bfloat16
def test_a_single_row_reads_the_plain_weight_and_several_the_packed_one():
    torch.manual_seed(0)
    layer = PackedLinear(torch.randn(40, 96).bfloat16())
    x = torch.randn(2, 1, 96).bfloat16()
    assert torch.equal(layer(x[:1]), nn.functional.linear(x[:1], layer.weight))
    layer.weight.zero_()  # the packed copy stays as it was
    assert not layer(x[:1]).any()
    assert layer(x).all()


@needs_bfloat16
def test_only_frozen_bfloat16_weights_are_packed():
    layers = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()))
    layers[1].requires_grad_(False)
    pack_linears(layers)
    assert [type(layers[0]), type(layers[1][0]), type(layers[1][1])] == [nn.Linear, nn.Linear, PackedLinear]


@needs_bfloat16
def test_a_packed_target_is_the_same_target():
    plain, packed = make(torch.bfloat16), make(torch.bfloat16)
    packed.pack()
    packed.pack()  # again changes nothing
    assert packed.packed
    assert isinstance(packed.layers[0].self_attn.qkv_proj, FusedLinear)
    assert not plain.packed
    assert packed.fingerprint() == plain.fingerprint()
    assert packed.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in packed.state_dict().items())
    plain.load_state_dict(packed.state_dict())
    tokens = torch.randint(80, (2, 9))
    torch.testing.assert_close(
        packed.logits(packed(tokens).final), plain.logits(plain(tokens).final), rtol=2**-5, atol=2**-5
    )
    packed.to("cpu")
    with pytest.raises(RuntimeError, match="move a model before decoding"):
        packed.to("meta")


def test_float32_weights_stay_as_they_are():
    target = make(torch.float32)
    SpeculativeDecoder(target)
    assert not target.packed
    assert isinstance(target.layers[0].mlp.up_proj, nn.Linear)


@needs_bfloat16
@pytest.mark.parametrize("name", ["FastEagle", "Eagle3", "Medusa", "DraftModel"])
@pytest.mark.parametrize("draft_vocab", [None, 30])
def test_decoding_packs_a_frozen_drafter_and_leaves_the_trained_one(name, draft_vocab):
    target = make(torch.bfloat16)
    trained = getattr(drafters, name)(depth=2, draft_vocab=draft_vocab).bind(target)
    if draft_vocab:
        trained.use_vocabulary(torch.arange(0, 60, 2))
    drafter = for_inference(trained)
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    x = torch.randn(1, 2, 64, dtype=torch.bfloat16)
    logits = drafter.frozen_logits(x)
    decoder = SpeculativeDecoder(target, drafter, tree=(2, 1))
    assert not any(isinstance(module, PackedLinear) for module in trained.modules())
    assert any(isinstance(module, PackedLinear) for module in drafter.modules())
    reads_the_targets_head = name in ("FastEagle", "DraftModel")
    assert bool(drafter._packed_rows) == (draft_vocab is not None and reads_the_targets_head)
    assert not any(isinstance(module, nn.Linear) for module in drafter.modules())
    assert drafter.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    torch.testing.assert_close(drafter.frozen_logits(x), logits, rtol=2**-6, atol=2**-6)
    out = decoder.generate([[1, 2, 3]], max_new_tokens=12)
    assert len(out.new_tokens[0]) == 12
    assert peak_bytes(lambda: decoder.generate([[1, 2, 3]], max_new_tokens=4), drafter.weights(), target.device) > 0


@needs_bfloat16
def test_packed_weights_are_not_replaced_or_moved():
    layer = PackedLinear(torch.randn(8, 16).bfloat16())
    x = torch.randn(2, 16).bfloat16()
    before = layer(x)
    with pytest.raises(RuntimeError, match="load weights before"):
        layer.load_state_dict({"weight": torch.zeros(8, 16)})
    with pytest.raises(RuntimeError, match="move a model before decoding"):
        layer.float()
    assert torch.equal(layer(x), before)
    assert layer.weight.dtype == torch.bfloat16
