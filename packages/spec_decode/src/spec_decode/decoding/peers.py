"""Benchmark of transformers' own `generate` on the same prompts."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from kd_common.hub.language_models import load_causal_lm


def transformers_peers(
    name: str,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stops: Sequence[int],
    assistant: str | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Measure the tokens per second of transformers' `generate`: alone, with prompt lookup, assisted."""

    def loaded(name: str) -> Any:
        model: Any = load_causal_lm(name, dtype)
        model.generation_config = GenerationConfig()  # without penalties, as in the other decoders
        return model.to(device)

    model = loaded(name)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "eos_token_id": list(stops) or None,
        "pad_token_id": 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    }
    speeds = {}
    ways: dict[str, dict[str, Any]] = {
        "transformers": {},
        "transformers prompt lookup": {"prompt_lookup_num_tokens": 4},
    }
    if assistant is not None:
        ways["transformers assisted"] = {"assistant_model": loaded(assistant)}
    for label, extra in ways.items():
        tokens, seconds = 0, 0.0
        for index, prompt in enumerate([prompts[0], *prompts]):
            ids = torch.tensor([prompt], device=device)
            torch.manual_seed(index)
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **extra)
            if out.is_cuda:
                torch.cuda.synchronize()
            if index:  # the first is a warm-up
                tokens, seconds = tokens + out.shape[1] - ids.shape[1], seconds + time.perf_counter() - start
        speeds[label] = tokens / seconds
    return speeds
