"""Layers of Llama-style decoders, shared by targets and drafters; parameters have transformers' names.

A layer does not know where keys and values come from. It is given an `Attend`, which closes over a cache and a mask, or
over nothing when a whole sequence is trained on. Shapes: B rows, n positions, H query and K key-value heads of size d,
h hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of shape (B, n, 1, d)."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, n, H, d), keys and values (B, n, K, d) of the positions at hand -> contexts (B, n, H * d)."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes and switches of a decoder layer.

    Args:
        hidden_size: H.
        intermediate_size: Width of the gated MLP.
        heads: H, a multiple of `kv_heads`.
        kv_heads: K.
        head_dim: D.
        norm_eps: Epsilon of every RMSNorm.
        activation: Name of the MLP's activation in transformers.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has one.
        mlp_bias: Whether the MLP's projections have one.
        qk_norm: Whether queries and keys are normalised per head (Qwen3).
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; under autocast in the precision of the weight."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def rotation(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> Rotation:
    """Return the cosines and sines of rotary position embeddings, computed in fp32.

    Args:
        positions: int64 of shape (B, n).
        frequencies: Radians per position, float32 of shape (d / 2,).
        scale: Factor on both, 1 except for some long-context variants.
        dtype: Type to return them in.
    """
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head of x, shape (B, n, heads, d); the result has x's type."""
    first, second = x.chunk(2, dim=-1)
    return (x * by[0] + torch.cat((-second, first), dim=-1) * by[1]).to(x.dtype)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return the attention of few queries to a cache; the query heads that share a key head become further rows of it.

    Args:
        q: Queries of shape (B, n, H, d).
        k: Keys of shape (B, K, S, d).
        v: Values of shape (B, K, S, d).
        mask: Shape (B, 1, (H / K) * n, S), n varying fastest: 0 where a query sees a key, -inf elsewhere, in q's type.

    Returns:
        Contexts of shape (B, n, H * d).
    """
    batch, size, heads, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    q = q.view(batch, size, kv_heads, groups, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * size, dim)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    context = context.view(batch, kv_heads, groups, size, dim).permute(0, 3, 1, 2, 4)
    return context.reshape(batch, size, heads * dim)


def causal_attention(window: int | None = None) -> Attend:
    """Return the attention within whole right-padded sequences.

    A window limits it to that many last positions.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if window is not None and window < q.shape[1]:
            age = torch.arange(q.shape[1], device=q.device).unsqueeze(1) - torch.arange(q.shape[1], device=q.device)
            mask = (age >= 0) & (age < window)
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return context.transpose(1, 2).flatten(2)

    return attend


class Attention(nn.Module):
    """Attention layer: projections around an `Attend`.

    Args:
        shape: Sizes and switches.
        in_features: Width of the input; None means the hidden size.
    """

    qkv_proj: nn.Module | None

    def __init__(self, shape: LayerShape, in_features: int | None = None) -> None:
        super().__init__()
        width = in_features or shape.hidden_size
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(width, shape.heads * shape.head_dim, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden_size, bias=shape.out_bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.register_module("qkv_proj", None)
        self.fuses = {} if shape.qk_norm else {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def forward(self, x: Tensor, by: Rotation, attend: Attend) -> Tensor:
        """Return the attention output of shape (B, n, h) for inputs of shape (B, n, in_features)."""
        if self.qkv_proj is None:
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = rotate(self.q_norm(q), by), rotate(self.k_norm(k), by)
        else:  # fewer operations are faster for the few rows of a step
            both, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split((sum(self.heads[:2]), self.heads[2]), 2)
            q, k = rotate(both, by).split(self.heads[:2], 2)
        return self.o_proj(attend(q, k, v))


class GatedMLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.activation = ACT2FN[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the same shape as x."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection.

    Args:
        shape: Sizes and switches.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedMLP(shape)

    def forward(self, x: Tensor, by: Rotation, attend: Attend) -> Tensor:
        """Return the output of the same shape (B, n, h) as x."""
        x = x + self.self_attn(self.input_layernorm(x), by, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
