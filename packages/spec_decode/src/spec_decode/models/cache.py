"""Static key-value cache whose rows have lengths of their own, and one pass of tree nodes or tokens over it.

Rows start at slot 0, so the slot of a committed token is its absolute position and no row is ever padded on the left.
The nodes of a pass lie behind a row's committed length; whatever lies there is invisible to later passes until
`commit` has counted it. Shapes: B rows, n nodes, S slots, K key-value heads of size d.
"""

import torch
from torch import Tensor

from spec_decode.models.layers import Attend, grouped_attention
from spec_decode.tree import ancestor_mask

_SLOT_BLOCK = 64  # attention reads whole blocks, so that the shapes of consecutive passes mostly repeat


class KVCache:
    """Keys and values of all layers.

    Args:
        layers: Number of layers.
        batch: B.
        capacity: S, the largest length of a row plus the largest number of nodes of a pass.
        kv_heads: K.
        head_dim: d.
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
        """S."""
        return self.keys.shape[3]

    def commit(self, path: Tensor, kept: Tensor) -> None:
        """Keep the first `kept` nodes of each row's path of the last pass and forget its other nodes.

        Args:
            path: Nodes from the root down, int64 of shape (B, D), ascending within a row.
            kept: Nodes to keep, int64 of shape (B,), in [0, D].
        """
        level = torch.arange(path.shape[1], device=path.device)
        rows, levels = ((path != level) & (level < kept.unsqueeze(1))).nonzero(as_tuple=True)
        if len(rows):  # the backbone already lies where it belongs
            start = self.lengths[rows]
            source, destination = start + path[rows, levels], start + levels
            for cached in (self.keys, self.values):
                cached[:, rows, :, destination] = cached[:, rows, :, source]
        self.lengths = self.lengths + kept


class Pass:
    """One pass of new nodes over a cache: their positions, where they are written and what they see.

    Args:
        cache: Cache to write to; its lengths do not change.
        size: n, the nodes of every row.
        parents: Parent array of shape (B, n) of a tree whose root follows the committed tokens; None for a run of
            tokens each of which follows the one before.
        groups: Query heads per key head.
        window: Number of last positions a windowed layer sees; None without such layers.

    Raises:
        ValueError: If the nodes do not fit the cache.
    """

    def __init__(
        self, cache: KVCache, size: int, parents: Tensor | None = None, *, groups: int = 1, window: int | None = None
    ) -> None:
        self.cache = cache
        device, lengths = cache.lengths.device, cache.lengths
        end = int(lengths.max()) + size
        if end > cache.capacity:
            raise ValueError(
                f"{size} nodes behind {end - size} cached tokens exceed the cache's {cache.capacity} slots; "
                "allocate a larger cache"
            )
        order = torch.arange(size, device=device)
        if parents is None:
            seen, ahead = (order.unsqueeze(1) >= order).expand(len(lengths), -1, -1), order
        else:
            seen = ancestor_mask(parents)
            ahead = seen.sum(-1) - 1
        self.positions = lengths.unsqueeze(1) + ahead
        self.slots = lengths.unsqueeze(1) + order
        self.visible = min(-(-end // _SLOT_BLOCK) * _SLOT_BLOCK, cache.capacity)
        slot = torch.arange(self.visible, device=device)
        mask = (slot < lengths.unsqueeze(1)).unsqueeze(1).repeat(1, size, 1)
        mask.scatter_(2, self.slots.unsqueeze(1).expand_as(seen), seen)
        self._mask = mask.unsqueeze(1).repeat(1, 1, groups, 1)
        self._window_mask = self._mask
        if window is not None and window < end:
            age = (
                self.positions.unsqueeze(2)
                - slot.repeat(len(lengths), 1).scatter(1, self.slots, self.positions)[:, None]
            )
            self._window_mask = (mask & (age < window)).unsqueeze(1).repeat(1, 1, groups, 1)
        self._rows = torch.arange(len(lengths), device=device).unsqueeze(1)

    def attend(self, layer: int, *, windowed: bool = False) -> Attend:
        """Attention of one layer: writes the nodes' keys and values, then reads the cache through the mask."""
        mask = self._window_mask if windowed else self._mask

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[self._rows, :, self.slots] = k.to(keys.dtype)
            values[self._rows, :, self.slots] = v.to(values.dtype)
            return grouped_attention(q, keys[:, :, : self.visible], values[:, :, : self.visible], mask)

        return attend
