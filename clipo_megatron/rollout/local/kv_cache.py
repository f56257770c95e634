"""The key-value cache of the local engine: written in place, grown in blocks, shrunk row by row.

transformers' `DynamicCache` copies all keys and values for every token. This cache writes a token into memory that is
already allocated and overwrites a finished row with a live one, so that only what changes is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _Layer(DynamicLayer):
    """One layer: `keys` and `values` are views of `store`, [2, rows, heads, room, head size]."""

    def __init__(self, store: Tensor | None = None, rows: int = 0, length: int = 0):
        super().__init__()
        self.store = store
        self._show(rows, length)

    def _show(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.is_initialized = self.store is not None
        if self.store is not None:
            self.keys, self.values = self.store[:, :rows, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows, heads, tokens, size = key_states.shape
        start, end = self.length, self.length + tokens
        if self.store is None:
            self.store = key_states.new_empty(2, rows, heads, end, size)
        elif end > self.store.shape[3]:
            grown = key_states.new_empty(2, rows, heads, room_for(end), size)
            grown[:, :, :, :start] = self.store[:, :rows, :, :start]
            self.store = grown
        self.store[0, :rows, :, start:end] = key_states
        self.store[1, :rows, :, start:end] = value_states
        self._show(rows, end)
        return self.keys, self.values


class KVCache(Cache):
    """Keys and values of a batch of rows, for transformers' decoder layers."""

    def __init__(self, layers: Sequence[_Layer] | int):
        super().__init__(layers=[_Layer() for _ in range(layers)] if isinstance(layers, int) else list(layers))

    def repeated(self, rows: int, *, room: int) -> KVCache:
        """Copy this one-row cache into `rows` rows, with memory for `room` tokens each."""
        layers = []
        for layer in self.layers:
            _, _, heads, _, size = layer.store.shape
            store = layer.store.new_empty(2, rows, heads, room, size)
            store[:, :, :, : layer.length] = layer.store[:, :1, :, : layer.length]
            layers.append(_Layer(store, rows, layer.length))
        return KVCache(layers)

    @staticmethod
    def assembled(parts: Sequence[PrefilledBatch], *, repeats: int, shared: int, length: int, room: int) -> KVCache:
        """Assemble a cache with `repeats` neighbouring rows for each row of each part, `length` columns each.

        A row is laid out as [shared prefix | zeros | its own tokens]; the zeros have to be masked.
        """
        prompts = sum(part.cache.layers[0].rows for part in parts)
        layers = []
        for index, first in enumerate(parts[0].cache.layers):
            _, _, heads, _, size = first.store.shape
            store = first.store.new_empty(2, prompts, repeats, heads, room, size)
            row = 0
            for part in parts:
                source = part.cache.layers[index]
                target = store[:, row : row + source.rows]
                own, once = length - part.padded, source.store[:, :, None]
                target[..., :shared, :] = once[..., :shared, :]
                target[..., shared:own, :] = 0
                target[..., own:length, :] = once[..., shared : source.length, :]
                row += source.rows
            layers.append(_Layer(store.flatten(1, 2), prompts * repeats, length))
        return KVCache(layers)

    def move_rows(self, holes: Tensor, sources: Tensor, rows: int) -> None:
        """Overwrite the rows `holes` with the rows `sources`, then keep the first `rows` rows."""
        for layer in self.layers:
            layer.store[:, holes] = layer.store[:, sources]
            layer._show(rows, layer.length)


@dataclass(frozen=True, slots=True)
class PrefilledBatch:
    """Prompts that were prefilled together."""

    cache: KVCache  # a row for each prompt: the shared prefix, then the prompt's own tokens aligned to the right
    padded: int  # columns of the prompts' own tokens


def room_for(length: int) -> int:
    """How many tokens to allocate when `length` are needed: a quarter more, and at least 64 more."""
    return length + max(64, length // 4)
