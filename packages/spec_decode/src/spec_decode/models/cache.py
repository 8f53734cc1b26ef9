"""Static key-value cache whose rows differ in length, and one pass of tree nodes or tokens over it.

Rows start at slot 0, so the slot of a committed token is its absolute position and no row is ever padded on the left.
The nodes of a pass follow a row's committed length. They are invisible to later passes until `commit` has counted them.
Shapes: B rows, n nodes, S slots, K key-value heads of size d.
"""

from typing import Any

import torch
from torch import Tensor

from spec_decode.decoding.tree import ancestor_mask
from spec_decode.models.layers import Attend, grouped_attention

_SLOT_BLOCK = 64  # attention reads whole blocks, so that the shapes of consecutive passes mostly repeat


class KVCache:
    """Keys and values of all layers.

    Args:
        layers: Number of layers.
        batch: B.
        capacity: S, the largest length of a row plus the largest number of nodes of a pass.
        kv_heads: K.
        head_dim: D.
        dtype: Type of keys and values.
        device: Where they live.

    Attributes:
        keys: Tensor of shape (layers, B, K, S, d).
        values: Tensor of the same shape.
        lengths: Committed tokens per row, int64 of shape (B,).
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        # Zeros, not empty: a masked NaN would still poison the weighted sum of the values.
        self.keys = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """Return the number S of slots."""
        return self.keys.shape[3]

    def commit(self, path: Tensor, kept: Tensor) -> None:
        """Keep the first `kept` nodes of each row's path of the last pass and forget its other nodes.

        Args:
            path: Nodes from the root down, int64 of shape (B, D), ascending within a row.
            kept: Nodes to keep, int64 of shape (B,), in [0, D].
        """
        level = torch.arange(path.shape[1], device=path.device)
        rows, levels = ((path != level) & (level < kept.unsqueeze(1))).nonzero(as_tuple=True)
        if len(rows):  # the backbone is already in place
            start = self.lengths[rows]
            source, destination = start + path[rows, levels], start + levels
            for cached in (self.keys, self.values):
                cached[:, rows, :, destination] = cached[:, rows, :, source]
        self.lengths = self.lengths + kept


class DecodingPass:
    """One pass of new nodes over a cache: their positions, their slots and their visibility.

    Args:
        cache: Cache to write to; its lengths do not change.
        ahead: Position of every node behind its row's committed tokens, int64 of shape (B, n) or (n,).
        seen: Boolean of shape (B, n, first + n): the slots behind the committed tokens that a node sees, those of
            earlier passes first. All nodes see the committed tokens.
        first: Slot of the first node behind the committed tokens; more than 0 keeps the nodes of earlier passes.
        groups: Query heads per key head.
        window: Number of last positions a windowed layer sees; None without such layers.

    Raises:
        ValueError: If the nodes do not fit the cache.
    """

    def __init__(
        self,
        cache: KVCache,
        ahead: Tensor,
        seen: Tensor,
        *,
        first: int = 0,
        groups: int = 1,
        window: int | None = None,
    ) -> None:
        self.cache = cache
        lengths, size = cache.lengths, seen.shape[1]
        end = int(lengths.max()) + first + size
        if end > cache.capacity:
            raise ValueError(
                f"{first + size} nodes behind {end - first - size} cached tokens exceed the cache's {cache.capacity} "
                "slots; allocate a larger cache"
            )
        batch, device = len(lengths), lengths.device
        self.positions = (lengths.unsqueeze(1) + ahead).expand(batch, size)
        reachable = lengths.unsqueeze(1) + torch.arange(first + size, device=device)
        self._rows, self._slots = torch.arange(batch, device=device).unsqueeze(1), reachable[:, first:]
        self._visible = min(-(-end // _SLOT_BLOCK) * _SLOT_BLOCK, cache.capacity)
        slot = torch.arange(self._visible, device=device)
        mask = (slot < lengths.unsqueeze(1)).unsqueeze(1).repeat(1, size, 1)
        mask.scatter_(2, reachable.unsqueeze(1).expand(batch, size, -1), seen.expand(batch, -1, -1))
        self._mask = self._window_mask = self._additive(mask, groups)
        if window is not None and window < end:
            assert first == 0, "positions of the nodes of earlier passes are not kept"
            key_positions = slot.repeat(batch, 1).scatter(1, self._slots, self.positions)
            recent = self.positions.unsqueeze(2) - key_positions.unsqueeze(1) < window
            self._window_mask = self._additive(mask & recent, groups)

    def _additive(self, mask: Tensor, groups: int) -> Tensor:
        """Return the mask for `grouped_attention`; a boolean one would be converted anew in every layer."""
        bias = torch.zeros(mask.shape, dtype=self.cache.keys.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        return bias.unsqueeze(1).repeat(1, 1, groups, 1)

    @classmethod
    def run(cls, cache: KVCache, size: int, **settings: Any) -> "DecodingPass":
        """Return the pass of `size` tokens each of which follows the one before."""
        order = torch.arange(size, device=cache.lengths.device)
        return cls(cache, order, (order.unsqueeze(1) >= order).unsqueeze(0), **settings)

    @classmethod
    def tree(cls, cache: KVCache, parents: Tensor, **settings: Any) -> "DecodingPass":
        """Return the pass of a draft tree given as a parent array (B, n), whose root follows the committed tokens."""
        seen = ancestor_mask(parents)
        return cls(cache, seen.sum(-1) - 1, seen, **settings)

    def attend(self, layer: int, *, windowed: bool = False) -> Attend:
        """Return the attention of one layer: write the nodes' keys and values, then read the cache through the mask."""
        mask = self._window_mask if windowed else self._mask

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[self._rows, :, self._slots] = k.to(keys.dtype)
            values[self._rows, :, self._slots] = v.to(values.dtype)
            return grouped_attention(q, keys[:, :, : self._visible], values[:, :, : self._visible], mask)

        return attend
