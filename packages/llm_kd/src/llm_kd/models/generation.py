"""Batched generation that leaves model and random state as it found them."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from kd_common.errors import UserError
from kd_common.hub.vocabulary import configured_ends
from kd_common.sampling import SamplingParams
from llm_kd.models.context_length import context_length


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seed: int,
    batch_size: int,
    vocab_size: int | None = None,
    synced: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Responses of a causal language model to prompts.

    Prompts are sorted by length, so that a batch holds little padding. The model generates in evaluation mode with a
    key-value cache, whatever it was set to, and is set back afterwards. Of the generation settings in its folder, only
    the tokens that end a response are used (`response_ends`): nothing is forced, suppressed or penalised. The
    random state of the CPU and of the model's device stays as it was.

    Args:
        model: A transformers model that generates, or a peft model around one.
        prompts: Token ids, at least one per prompt.
        sampling: How tokens are drawn.
        eos_ids: Tokens that end a response, besides those that the model's configurations name.
        pad_id: Token that fills up the prompts of a batch.
        seed: Seed of the drawing; the same call with the same seed gives the same responses.
        batch_size: Prompts per batch.
        vocab_size: Size of the tokenizer's vocabulary; what the model's head has beyond it is never generated. None if
            it has nothing beyond.
        synced: Keep all ranks generating until the last of them is done, as sharded models need it; every rank must
            then give equally many prompts.
        streamer: Shown every token as it is drawn; those of transformers take one prompt at a time.

    Returns:
        Response of every prompt in the order of the prompts, with the token that ended it if one did; no padding.

    Raises:
        UserError: If a prompt is empty, or too long for the positions of the model.
    """
    _check_lengths(model, prompts, sampling)
    device = next(model.parameters()).device
    eos_ids = response_ends(model, eos_ids)
    settings = _generation_config(sampling, eos_ids, pad_id)
    beyond = LogitsProcessorList() if vocab_size is None else LogitsProcessorList([_Forbid(vocab_size)])
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)  # longest first: if
    responses: list[list[int]] = [[] for _ in prompts]  # the memory does not suffice, the first batch tells
    with _generating(model), _seeded(seed, device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = _left_padded([prompts[number] for number in batch], pad_id, device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=beyond,
                synced_gpus=synced,
                streamer=streamer,
            )
            for number, tokens in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                responses[number] = _until_end(tokens, eos_ids)
    return responses


def response_ends(model: Any, eos_ids: Collection[int]) -> list[int]:
    """Return the sorted tokens that end a response: the given ones, and those of the configurations of the model."""
    return sorted({*eos_ids, *configured_ends(model.config, model.config.get_text_config(), model.generation_config)})


def prompt_budget(model: Any, sampling: SamplingParams) -> int:
    """Return the largest number of tokens of a prompt that leaves the model positions for its longest response."""
    return context_length(model.config) - sampling.max_new_tokens


def _check_lengths(model: Any, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
    if not all(prompts):
        raise UserError("a prompt holds no token; a model needs at least one to continue from")
    longest, budget = max(map(len, prompts), default=0), prompt_budget(model, sampling)
    if longest > budget:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed the model's "
            f"{budget + sampling.max_new_tokens} positions: lower max_new_tokens, or give shorter prompts"
        )


def _generation_config(sampling: SamplingParams, eos_ids: Collection[int], pad_id: int) -> GenerationConfig:
    drawing = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **(drawing if sampling.temperature > 0 else {}),
    )


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts that all end in the last column, both of shape (B, S), int64."""
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_end(tokens: list[int], eos_ids: Collection[int]) -> list[int]:
    """Return the tokens up to and including the first that ends a response."""
    ends = (place for place, token in enumerate(tokens) if token in eos_ids)
    return tokens[: next(ends, len(tokens)) + 1]


class _Forbid:
    """Logits processor that rules out tokens from a number on."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= self.vocab_size
        return scores.masked_fill(beyond, -math.inf)


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Evaluation mode, without the checkpoint's own settings: they would fill in what a configuration leaves open."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    own = [(module, vars(module)["generation_config"]) for module in modules if "generation_config" in vars(module)]
    model.eval()
    for module, _ in own:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, settings in own:
            module.generation_config = settings


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random state of the CPU and one device from a seed, and the earlier one afterwards."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type=None if on_cpu else device.type):
        torch.manual_seed(seed)
        yield
