"""Depth pruning: a student made of some of a model's decoder layers."""

import copy
import re

from torch import nn
from transformers import PreTrainedModel


def evenly_spaced(total: int, keep: int) -> list[int]:
    """Indices of ``keep`` of ``total`` layers, evenly spaced with the first and the last (keep = 1: the first).

    Raises:
        ValueError: If keep is outside [1, total].
    """
    if not 1 <= keep <= total:
        raise ValueError(f"student.layers must lie in [1, {total}], the layers of the model, got {keep}")
    return [round(i * (total - 1) / max(1, keep - 1)) for i in range(keep)]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a causal language model and their path.

    Raises:
        ValueError: If there is no single list of as many modules as the configuration has layers.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__}: cannot tell which of its modules are the decoder layers")
    return lists[0]


def depth_prune(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """A new model of ``keep`` evenly spaced layers, all its weights copied.

    Args:
        model: Causal language model; unchanged.
        keep: Number of layers.

    Raises:
        ValueError: If keep is outside [1, number of layers] or the architecture is not understood.
    """
    path, layers = decoder_layers(model)
    kept = evenly_spaced(len(layers), keep)
    config = copy.deepcopy(model.config)
    # What is listed per layer must fit the new number of layers: Gemma 2 and Qwen 2 alternate kinds of attention.
    per_layer = {
        name: [value[i] for i in kept]
        for name, value in config.to_dict().items()
        if name.endswith("layer_types") and isinstance(value, list) and len(value) == len(layers)
    }
    config.update({"num_hidden_layers": keep, **per_layer})
    student = type(model)._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    source = model.state_dict()
    places = {str(new): str(old) for new, old in enumerate(kept)}
    layer_key = re.compile(rf"({re.escape(path)}\.)(\d+)(\..*)")

    def origin(key: str) -> str:
        match = layer_key.fullmatch(key)
        return key if match is None else match[1] + places[match[2]] + match[3]

    student.load_state_dict({key: source[origin(key)] for key in student.state_dict()})
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)
