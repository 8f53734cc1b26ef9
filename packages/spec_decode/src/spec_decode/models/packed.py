"""Frozen bfloat16 weights in the layout of the CPU's matrix kernels, in addition to the plain ones.

For a few rows, converting a plain bfloat16 weight into oneDNN's blocked layout takes a large part of every product. For
a single row plain weights are read faster than blocked ones. So both are kept, and packing does not slow plain decoding
down; `benchmarks/target_pass.py` measures it. `torch.compile` also converts frozen weights once; the operators here are
the ones that its generated code calls.
"""

from typing import Any

import torch
from torch import Tensor, nn


def packable(weight: Tensor) -> bool:
    """Return whether packing this weight pays: frozen, bfloat16, on a CPU whose kernels read packed weights."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and not weight.requires_grad
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """Frozen linear layer that reads a packed copy of its weight for several rows, the plain weight for one.

    Args:
        weight: `packable` weight of shape (m, k).
        bias: Shape (m,), or None.
    """

    weight: Tensor
    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        plain = weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(plain, 8)  # laid out for 8 rows
        self.register_buffer("packed", packed, persistent=False)  # first, because a failed move then changes nothing
        self.register_buffer("weight", plain)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map shape (..., k) to (..., m) by x W^T + bias."""
        if x.shape[:-1].numel() == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        try:
            return super()._apply(*args, **kwargs)
        except NotImplementedError as error:
            raise RuntimeError("packed weights stay on the CPU; move a model before decoding with it") from error

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("packed weights stay as they are; load weights before a decoder packs them")


class FusedLinear(PackedLinear):
    """Packed linear layers with the same input as one product; it saves them under their former names.

    Args:
        layers: Layers by the name they have in the module that this one becomes part of; all have a bias or none has.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        weights: list[Tensor] = [layer.weight for layer in layers.values()]
        biases: list[Tensor] = [layer.bias for layer in layers.values() if layer.bias is not None]
        super().__init__(torch.cat(weights), torch.cat(biases) if biases else None)
        self.sizes = {name: layer.out_features for name, layer in layers.items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        module = prefix[: prefix[:-1].rfind(".") + 1]
        for kind, rows in (("weight", self.weight), ("bias", self.bias)):
            if rows is not None:
                for name, part in zip(self.sizes, rows.split(list(self.sizes.values())), strict=True):
                    destination[f"{module}{name}.{kind}"] = part


def pack_linears(module: nn.Module) -> None:
    """Replace a module's linear layers that have `packable` weights, in place.

    Layers that a module's attribute `fuses` lists under a joint name become one `FusedLinear` of that name.
    """
    for union, names in getattr(module, "fuses", {}).items():
        children = dict(module.named_children())
        layers = {name: child for name in names if isinstance(child := children.get(name), nn.Linear)}
        if len(layers) == len(names) and all(packable(layer.weight) for layer in layers.values()):
            setattr(module, union, FusedLinear(layers))
            for name in names:
                delattr(module, name)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if packable(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linears(child)
