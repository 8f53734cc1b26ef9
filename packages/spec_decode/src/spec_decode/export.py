"""`python -m spec_decode.export`: an EAGLE-3 drafter in the layout of its authors, which serving engines read.

Weights `fc`, `midlayer`, `norm` and `lm_head` with the vocabulary maps `d2t` (target token - draft token) and
`t2d` (whether a target token can be drafted). Nothing else reads the other drafters; their own folder is the format.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.export")  # before the imports below, which take seconds

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from safetensors.torch import save
from torch import Tensor

from kd_common.checks import one_of
from kd_common.errors import UserError
from kd_common.files import write_atomically
from kd_common.hub.language_models import DTYPES, load_config
from kd_common.hub.weight_files import shown
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_folder
from spec_decode.drafters.files import check_target_sizes, read_config, read_weights
from spec_decode.models.causal_lm import default_feature_layers

_NAMES = {"fuse": "fc", "layer": "midlayer", "norm": "norm", "head": "lm_head"}
LAYOUT = frozenset(
    f"{name}.weight"
    for name in (
        "fc",
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        *(f"midlayer.self_attn.{part}_proj" for part in "qkvo"),
        "midlayer.post_attention_layernorm",
        *(f"midlayer.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "norm",
        "lm_head",
    )
)
"""What engines read beside the vocabulary maps; of other weights some take no notice, and draft wrongly."""

_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
)


def eagle3_layout(state: dict[str, Tensor], vocab_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of an `Eagle3` drafter under the names of the EAGLE-3 code.

    Args:
        state: The drafter's state dictionary.
        vocab_size: Tokens of the target.
        dtype: Precision to store.

    Raises:
        UserError: If the weights are not exactly those of `LAYOUT`, or not finite in this precision.
    """
    vocabulary = state.get("vocabulary", torch.arange(vocab_size))
    can_draft = torch.zeros(vocab_size, dtype=torch.bool)
    can_draft[vocabulary] = True
    weights = {}
    for name, value in state.items():
        if name != "vocabulary":
            part, rest = name.split(".", 1)
            weights[f"{_NAMES[part]}.{rest}"] = value.to(dtype).contiguous()
    wrong = sorted(weights.keys() ^ LAYOUT) + sorted(n for n, w in weights.items() if not w.isfinite().all())
    if wrong:
        raise UserError(
            f"these weights are missing, unknown to the EAGLE-3 layout, or not finite in {dtype}: {shown(wrong)}; "
            "train the drafter again"
        )
    return weights | {"d2t": vocabulary - torch.arange(len(vocabulary)), "t2d": can_draft}


def check_servable(drafter: str, layers: Sequence[int], config: Any) -> None:
    """Refuse what engines would draft wrongly with, or not at all.

    Args:
        drafter: The drafter's folder, for the message.
        layers: Layers whose inputs it reads.
        config: transformers' configuration of the target.

    Raises:
        UserError: For other layers than the layout implies, layers that are not three different ones, or an activation
            other than SiLU.
    """
    implied = default_feature_layers(config.num_hidden_layers)
    if tuple(layers) != implied:
        raise UserError(
            f"{drafter} reads the layers {list(layers)}; the EAGLE-3 layout implies {implied}, and engines count the "
            "layers of a setting for others differently. Train with model.target.feature_layers null"
        )
    if len(set(implied)) < 3:
        raise UserError(
            f"{drafter} reads the layers {implied} of a target of {config.num_hidden_layers} layers, and engines "
            "collect each layer once; only drafters for targets of at least 7 layers can be exported"
        )
    if config.hidden_act != "silu":
        raise UserError(f"{drafter} has the target's activation {config.hidden_act}; engines' drafters have silu only")


def export(drafter: str, output: str, dtype: str = "bfloat16") -> None:
    """Write `model.safetensors` and `config.json`.

    Args:
        drafter: Folder of a drafter that `fit` wrote.
        output: Folder to write to.
        dtype: Precision of the weights.

    Raises:
        UserError: If the folder holds no drafter, or for another kind of drafter, one that reads other layers than
            EAGLE-3 does, or a target whose layers or activation engines do not draft for.
    """
    check_folder("--output", output)
    found = read_config(Path(drafter))
    if (kind := found["drafter"].get("name")) != "Eagle3":
        raise UserError(
            f"{drafter} is a {kind} drafter; only Eagle3 has a layout that other programs read. "
            "Load this one with spec_decode.drafters.load_drafter"
        )
    one_of("dtype", dtype, DTYPES)
    if (name := found.get("target")) is None:
        raise UserError(f"{drafter} does not say which target it was trained for; train it with spec_decode.fit")
    config = load_config(name)
    check_target_sizes(Path(drafter), found, config, name)
    check_servable(drafter, found["feature_layers"], config)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    weights = eagle3_layout(read_weights(Path(drafter), found), config.vocab_size, DTYPES[dtype])
    write_atomically(folder / "model.safetensors", save(weights, {"format": "pt"}))
    rope = dict(config.rope_parameters)
    settings = {
        **{name: value for name in _SHARED if (value := getattr(config, name, None)) is not None},
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": len(weights["d2t"]),
        "target_hidden_size": config.hidden_size,
        # Written out, for the defaults of engines differ and change.
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "rope_parameters": dict(config.rope_parameters),
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_command(lambda: auto_cli(export, as_positional=False, parser_class=CommandParser))
