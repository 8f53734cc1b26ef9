"""Depth pruning: a student made of some of a model's decoder layers."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_common.checks import within
from kd_common.errors import UserError

NOT_PER_LAYER = ("_token_id", "_token_ids", "architectures")
"""Endings of the settings that are lists, but not of layers, however many layers there are."""

PLACES = re.compile(r"layer|_idxs$|_indices$")
"""What the names of settings hold that list layers by their numbers."""

PROBE = 8
"""Tokens on which a pruned model is compared."""


def evenly_spaced(total: int, keep: int) -> list[int]:
    """Indices of `keep` of `total` layers, evenly spaced with the first and the last (keep = 1: the first).

    Raises:
        UserError: If keep is outside [1, total].
    """
    within("student.layers", keep, f"[1, {total}]")
    return [round(i * (total - 1) / max(1, keep - 1)) for i in range(keep)]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the decoder layers of a causal language model and their path.

    Raises:
        UserError: If there is no single list of as many modules as the configuration has layers.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise UserError(f"{type(model).__name__}: cannot tell which of its modules are the decoder layers")
    return lists[0]


def relisted(name: str, value: Any, kept: list[int], total: int) -> list[Any] | None:
    """Return the rest of a setting that lists values per layer, or the layers of a kind; None for other settings.

    Args:
        name: The setting.
        value: Its value for all layers.
        kept: Numbers of the layers that are kept.
        total: Number of layers.
    """
    if not isinstance(value, list | tuple) or name.endswith(NOT_PER_LAYER):
        return None
    places = [place for place in range(total) if place in value]
    if list(value) == places and not any(isinstance(entry, bool) for entry in value) and PLACES.search(name):
        return [new for new, old in enumerate(kept) if old in value]  # moe_layers of Llama 4
    return [value[i] for i in kept] if len(value) == total else None  # layer_types, no_rope_layers of SmolLM3


def depth_prune(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """Return a new model of `keep` evenly spaced layers, all its weights copied.

    Args:
        model: Causal language model; unchanged.
        keep: Number of layers.

    Raises:
        UserError: If keep is outside [1, number of layers], the architecture is not understood, or a layer computes
            something else at its new place.
    """
    path, layers = decoder_layers(model)
    kept = evenly_spaced(len(layers), keep)
    config = copy.deepcopy(model.config)
    per_layer = {
        name: listed
        for name, value in config.to_dict().items()
        if (listed := relisted(name, value, kept, len(layers))) is not None
    }
    config.update({"num_hidden_layers": keep, **per_layer})
    student = type(model)._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    source = model.state_dict()
    places = {str(new): str(old) for new, old in enumerate(kept)}
    layer_key = re.compile(rf"({re.escape(path)}\.)(\d+)(\..*)")

    def origin(key: str) -> str:
        match = layer_key.fullmatch(key)
        return key if match is None else match[1] + places[match[2]] + match[3]

    try:
        student.load_state_dict({key: source[origin(key)] for key in student.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise _moved(model, keep, f"its layers are of several kinds ({str(error).strip()[:200]})") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    student.eval()
    if not _same_in_place(model, layers, kept, student):
        raise _moved(model, keep, "a layer computes something else there than among all")
    return student.train(model.training)


def _moved(model: PreTrainedModel, keep: int, why: str) -> ValueError:
    return ValueError(
        f"student.layers {keep}: {type(model).__name__} cannot be pruned, for what a layer computes depends on its "
        f"place in a way that is not understood: {why}. Take a student of its own (student.name)"
    )


@torch.no_grad()
def _same_in_place(model: PreTrainedModel, layers: nn.ModuleList, kept: list[int], student: PreTrainedModel) -> bool:
    """Return whether a pruned model's hidden states are those of the whole model whose other layers pass theirs on."""

    def pass_on(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    tokens = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    hooks = [
        layer.register_forward_hook(pass_on, with_kwargs=True)
        for place, layer in enumerate(layers)
        if place not in kept
    ]
    try:
        expected, found = (
            lm(input_ids=tokens, position_ids=torch.arange(PROBE, device=model.device)[None], use_cache=False).logits
            for lm in (model, student)
        )
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    largest = float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=8 * torch.finfo(model.dtype).eps * largest)
