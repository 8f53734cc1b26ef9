"""The target by name: its runner and its tokenizer."""

from dataclasses import dataclass
from typing import Any

from kd_common.hub import load_causal_lm, load_tokenizer
from spec_decode.models import CausalLM


@dataclass(frozen=True)
class TargetSpec:
    """The model whose decoding is sped up; it is never trained.

    Args:
        name: Local folder, Hub name, or ``smollm2-135m-instruct``, which comes with the package index.
        dtype: Precision of its weights.
        feature_layers: Three layers whose inputs the drafter reads; None means EAGLE-3's 2, L // 2 and L - 3.
    """

    name: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    feature_layers: tuple[int, int, int] | None = None

    def load(self) -> CausalLM:
        """Runner on the CPU.

        Raises:
            ModelNotFoundError: If the model cannot be found.
            ValueError: If its architecture is not supported.
        """
        return CausalLM.from_transformers(load_causal_lm(self.name, self.dtype), self.feature_layers)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.name)
