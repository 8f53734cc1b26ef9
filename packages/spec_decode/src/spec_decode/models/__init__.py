"""Step runner for transformers' language models, its cache, and the layers drafters are made of."""

from spec_decode.models.cache import DecodingPass, KVCache
from spec_decode.models.causal_lm import SUPPORTED, CausalLM, States
from spec_decode.models.layers import DecoderLayer, LayerShape, RMSNorm

__all__ = ["SUPPORTED", "CausalLM", "DecoderLayer", "DecodingPass", "KVCache", "LayerShape", "RMSNorm", "States"]
