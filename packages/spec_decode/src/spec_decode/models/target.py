"""Target model by name: its runner and its tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch

from kd_common.hub.language_models import load_causal_lm, load_tokenizer
from spec_decode.models import CausalLM


def fast_dtype() -> str:
    """Return the precision in which this machine checks drafts fastest.

    This is bfloat16 on a GPU or a CPU with AVX-512, else float32.

    Without AVX-512 the cost of a bfloat16 matrix product grows with its rows. Checking a draft then costs about as much
    as plain decoding. `spec_decode.benchmark` writes the times of passes by size as `pass_seconds`.
    """
    native = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bfloat16" if native else "float32"


@dataclass(frozen=True)
class TargetSpec:
    """Target model; it is never trained.

    Args:
        name: Local folder, Hub name, or `smollm2-135m-instruct`, which comes with the package index.
        dtype: Precision of its weights; `auto` is `fast_dtype`.
        feature_layers: Three layers whose inputs the drafter reads; None means EAGLE-3's 2, L // 2 and L - 3.
    """

    name: str = "smollm2-135m-instruct"
    dtype: str = "auto"
    feature_layers: tuple[int, int, int] | None = None

    def load(self) -> CausalLM:
        """Return a runner on the CPU.

        Raises:
            ModelNotFoundError: If the model cannot be found.
            ValueError: If its architecture is not supported.
        """
        dtype = fast_dtype() if self.dtype == "auto" else self.dtype
        return CausalLM.from_transformers(load_causal_lm(self.name, dtype), self.feature_layers)

    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return load_tokenizer(self.name)
