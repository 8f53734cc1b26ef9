"""``python -m spec_decode.export``: an EAGLE-3 drafter in the layout of its authors, which serving engines read.

Weights ``fc``, ``midlayer``, ``norm`` and ``lm_head`` with the vocabulary maps ``d2t`` (target token - draft token) and
``t2d`` (whether a target token can be drafted). Nothing else reads the other drafters; their own folder is the format.
"""

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors.torch import save
from torch import Tensor

from kd_common.errors import run_command
from kd_common.files import write_atomically
from kd_common.hub import DTYPES, load_config
from kd_common.messages import CommandParser, check_folder
from spec_decode.drafters.files import read_config, read_weights
from spec_decode.models.causal_lm import default_feature_layers

_NAMES = {"fuse": "fc", "layer": "midlayer", "norm": "norm", "head": "lm_head"}
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
    """
    vocabulary = state.get("vocabulary", torch.arange(vocab_size))
    can_draft = torch.zeros(vocab_size, dtype=torch.bool)
    can_draft[vocabulary] = True
    weights = {}
    for name, value in state.items():
        if name != "vocabulary":
            part, rest = name.split(".", 1)
            weights[f"{_NAMES[part]}.{rest}"] = value.to(dtype).contiguous()
    return weights | {"d2t": vocabulary - torch.arange(len(vocabulary)), "t2d": can_draft}


def export(drafter: str, output: str, dtype: str = "bfloat16") -> None:
    """Write ``model.safetensors`` and ``config.json``.

    Args:
        drafter: Folder of a drafter that `fit` wrote.
        output: Folder to write to.
        dtype: Precision of the weights.

    Raises:
        FileNotFoundError: If the folder holds no drafter.
        ValueError: For another kind of drafter, or one that reads other layers than EAGLE-3 does.
    """
    check_folder("--output", output)
    found = read_config(Path(drafter))
    if (kind := found["drafter"].get("name")) != "eagle3":
        raise ValueError(
            f"{drafter} is a {kind} drafter; only eagle3 has a layout that other programs read. "
            "Load this one with spec_decode.drafters.load_drafter"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = load_config(found["target"])
    if tuple(found["feature_layers"]) != default_feature_layers(config.num_hidden_layers):
        raise ValueError(
            f"{drafter} reads the layers {found['feature_layers']}; the EAGLE-3 layout implies "
            f"{default_feature_layers(config.num_hidden_layers)}"
        )
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
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_command(lambda: auto_cli(export, as_positional=False, parser_class=CommandParser))
