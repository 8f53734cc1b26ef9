"""The target's passes compiled by Inductor."""

import shutil

import pytest
import torch

from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.drafters import FastEagle
from spec_decode.models import CausalLM


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler")
def test_compiled_passes_decode_the_same_text(tiny):
    """Prefill, trees across a block of cache slots."""
    target = CausalLM.from_transformers(tiny.make())
    drafter = FastEagle(depth=3).bind(target).eval().requires_grad_(False)
    decoder = SpeculativeDecoder(target, drafter, tree=(3, 2, 1), compile=True)
    settings = {"max_new_tokens": 70, "temperature": 1.0, "seed": 2}
    expected = SpeculativeDecoder(tiny.target).generate([[3, 1, 4]], **settings)
    assert torch.equal(decoder.generate([[3, 1, 4]], **settings).sequences, expected.sequences)
    tokens, counts = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    compiled, eager = (t.prefill(tokens, counts, t.new_cache(1, 80)) for t in (target, tiny.target))
    torch.testing.assert_close(compiled.final, eager.final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.features, eager.features, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="packs nothing on this machine")
def test_packed_weights_are_not_compiled(tiny):
    target = CausalLM.from_transformers(tiny.make().bfloat16())
    target.pack()
    with pytest.raises(RuntimeError, match="load it anew"):
        SpeculativeDecoder(target, compile=True)
