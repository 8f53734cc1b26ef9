"""The target's passes compiled by Inductor."""

import shutil

import pytest
import torch

from spec_decode.decoder import SpeculativeDecoder
from spec_decode.drafters import DrafterSpec
from spec_decode.models import CausalLM


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler")
def test_compiled_passes_decode_the_same_text(tiny):
    """Prefill, plain passes and trees, across a block of cache slots, for prompts of different lengths."""
    target = CausalLM.from_transformers(tiny.make())
    drafter = DrafterSpec("fast_eagle", {"depth": 3}).build(target).eval().requires_grad_(False)
    plain = SpeculativeDecoder(tiny.target)
    decoders = [SpeculativeDecoder(target, compile=True), SpeculativeDecoder(target, drafter, tree=(3, 2, 1))]
    for prompt, temperature in (([3, 1, 4], 0.0), ([1, 5, 9, 2, 6, 5, 3], 1.0)):
        settings = {"max_new_tokens": 80, "temperature": temperature, "seed": 2}
        expected = plain.generate([prompt], **settings)
        for decoder in decoders:
            assert torch.equal(decoder.generate([prompt], **settings).sequences, expected.sequences)
    compiled, eager = (
        t.prefill(torch.tensor([[1, 2, 3]]), torch.tensor([3]), t.new_cache(1, 8)) for t in (target, tiny.target)
    )
    torch.testing.assert_close(compiled.final, eager.final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.features, eager.features, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="packs nothing on this machine")
def test_packed_weights_are_not_compiled(tiny):
    target = CausalLM.from_transformers(tiny.make().bfloat16())
    target.pack()
    with pytest.raises(RuntimeError, match="load it anew"):
        SpeculativeDecoder(target, compile=True)
