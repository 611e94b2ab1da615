"""The KV cache that verifies a tree and keeps one path.

mlx-lm's models ask a layer's cache for three things: `offset` (the position their RoPE starts at),
`make_mask` and `update_and_fetch`. A `LayerCache` answers them so that an unmodified model verifies a token
tree: `offset` is the vector of the nodes' positions and the mask lets a node attend to its ancestors.
Committed positions are 0 ... length-1; the rows of the last forward lie behind them until `keep` commits a
path of them.

Buffers are written in place, in blocks; a rejected row costs nothing but being overwritten.

Letters: N rows of a forward, T committed positions, D head size, H key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import proxy

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from redrafter_mlx.device import on_gpu
from redrafter_mlx.tree import TokenTree

BLOCK = 256  # positions a buffer grows by
KV_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32)  # values that share a scale, as mx.quantize has them
Arrays = tuple[mx.array, ...]


class LayerCache:
    """Keys and values of one layer, plain or quantized, with or without a sliding window.

    A layer with a window keeps the last `window` positions and up to a block more; `start` is the position
    of its first row. Windows are enforced by the mask, so no ring buffer has to be unrolled or rewound.
    """

    def __init__(self, shared: KVCache, window: int | None = None) -> None:
        self._shared = proxy(shared)  # no cycle: else its memory would wait for Python's garbage collector
        self.window = window
        self.start = 0
        self.num_rows = 0  # committed and pending rows in the buffers
        self.keys: Arrays | None = None
        self.values: Arrays | None = None
        if shared.bits is not None:  # mlx-lm's attention takes the quantized path where a cache has `bits`
            self.bits = shared.bits
            self.group_size = shared.group_size

    @property
    def offset(self) -> int | mx.array:
        """Positions of the rows of the forward under way, as `mx.fast.rope` wants them."""
        return self._shared.positions

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """(N, rows) bool, or mlx-lm's short forms for a causal mask."""
        window = window_size or self.window
        length, tree = self._shared.length, self._shared.tree
        windowed = window is not None and length + N > window
        if tree is None or tree.is_chain:
            if not windowed and not return_array:
                return None if N == 1 else "causal"
            depth = mx.arange(N, dtype=mx.int32)
            own = depth[:, None] >= depth
        else:
            assert tree.mask is not None
            depth, own = tree.depth, tree.mask
        past = mx.arange(self.start, length, dtype=mx.int32)
        seen = mx.ones((N, past.shape[0]), dtype=mx.bool_)
        if window is not None and length + N > window:
            seen = (length + depth)[:, None] - past < window
            own = own & (depth[:, None] - depth < window)
        return mx.concatenate([seen, own], axis=1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append N rows behind the committed ones. (1, H, N, D) -> all rows (1, H, T+N, D)."""
        pending = keys.shape[2]
        first = self._shared.length - self.start
        self.keys = self._write(self.keys, self._encode(keys), first)
        self.values = self._write(self.values, self._encode(values), first)
        self.num_rows = first + pending
        if self._shared.bits is None:
            return self.keys[0][..., : self.num_rows, :], self.values[0][..., : self.num_rows, :]
        return tuple(tuple(a[..., : self.num_rows, :] for a in arrays) for arrays in (self.keys, self.values))  # type: ignore[return-value]

    def _encode(self, rows: mx.array) -> Arrays:
        if self._shared.bits is None:
            return (rows,)
        return tuple(mx.quantize(rows, group_size=self.group_size, bits=self.bits))

    def _write(self, buffers: Arrays | None, rows: Arrays, first: int) -> Arrays:
        end = first + rows[0].shape[2]
        if buffers is None or end > buffers[0].shape[2]:
            buffers = self._grown(buffers, rows, first, end)
        for buffer, row in zip(buffers, rows, strict=True):
            buffer[..., first:end, :] = row
        return buffers

    def _grown(self, buffers: Arrays | None, rows: Arrays, first: int, end: int) -> Arrays:
        wanted = end if self.window is not None else max(end, self._shared.reserved)
        capacity = -(-wanted // BLOCK) * BLOCK
        grown = []
        for index, row in enumerate(rows):
            shape = (*row.shape[:2], capacity - (first if buffers else 0), row.shape[3])
            tail = mx.zeros(shape, dtype=row.dtype)
            head = buffers[index][..., :first, :] if buffers else None
            grown.append(tail if head is None else mx.concatenate([head, tail], axis=2))
        return tuple(grown)

    def pick(self, path: mx.array) -> list[mx.array]:
        """The pending rows `path` (n,), of every buffer."""
        rows = path + (self._shared.length - self.start)
        return [mx.take(buffer, rows, axis=2) for buffer in self.arrays()]

    def put(self, picked: Sequence[mx.array]) -> None:
        """Write rows to the front of the pending ones."""
        first = self._shared.length - self.start
        for buffer, rows in zip(self.arrays(), picked, strict=True):
            buffer[..., first : first + rows.shape[2], :] = rows

    def drop_old(self, length: int) -> None:
        """Forget rows that no later position can attend to, a block at a time."""
        if self.window is None or length - self.start < self.window + BLOCK:
            return
        surplus = length - self.start - self.window
        assert self.keys is not None and self.values is not None
        self.keys = tuple(a[..., surplus:, :] for a in self.keys)
        self.values = tuple(a[..., surplus:, :] for a in self.values)
        self.start += surplus

    def arrays(self) -> list[mx.array]:
        return [*(self.keys or ()), *(self.values or ())]


class KVCache:
    """The caches of all layers and the one number they share: `length`, the committed positions."""

    def __init__(
        self,
        windows: Sequence[int | None],
        bits: int | None = None,
        group_size: int = 64,
    ) -> None:
        self.length = 0
        self.bits = bits
        self.group_size = group_size
        self.reserved = 0
        self.tree: TokenTree | None = None
        self.positions: int | mx.array = 0
        self.layers = [LayerCache(self, window) for window in windows]

    @classmethod
    def of(cls, model: nn.Module, bits: int | None = None, group_size: int = max(GROUP_SIZES)) -> KVCache:
        """A cache for `model` (mlx-lm's), a layer for every one that the model itself would make.

        Args:
            bits, group_size: how keys and values are quantized; None: not at all. See `check_bits`, `group_size_of`.

        Raises:
            ValueError: the model keeps something else than keys and values (a recurrent state, say).
        """
        windows: list[int | None] = []
        for index, layer in enumerate(make_prompt_cache(model)):
            if type(layer) is PlainKVCache:
                windows.append(None)
            elif type(layer) is RotatingKVCache and layer.keep == 0:
                windows.append(layer.max_size)
            else:
                raise ValueError(
                    f"{type(model).__module__} keeps a {type(layer).__name__} in layer {index}; only key/value "
                    "caches, with or without a sliding window, can verify a draft"
                )
        return cls(windows, bits, group_size)

    def reserve(self, length: int) -> None:
        """Allocate buffers for at least `length` positions at the next growth, so that none follows."""
        self.reserved = max(self.reserved, length)

    def begin(self, tree: TokenTree | None) -> None:
        """Announce the rows of the next forward: a tree's nodes, or None for a run of text."""
        self.tree = tree
        # A run of rows could do with its first position. On a CPU a vector of them is faster: see rope.py.
        if tree is None or tree.num_nodes == 1 or (tree.is_chain and on_gpu()):
            self.positions = self.length
        else:
            self.positions = tree.depth + self.length

    def commit(self, count: int) -> None:
        """Commit the first `count` pending rows (a run of text, or the front of a tree)."""
        self.length += count
        self.tree, self.positions = None, self.length
        for layer in self.layers:
            layer.drop_old(self.length)

    def keep(self, path: Sequence[int]) -> None:
        """Commit the nodes of `path`, root first. A path of the first rows is a trim, any other one gather."""
        if any(node != row for row, node in enumerate(path)):
            rows = mx.array(list(path), dtype=mx.int32)
            picked = [layer.pick(rows) for layer in self.layers]
            # Set going before the buffers are written: a buffer that an unlaunched operation still reads
            # would be copied whole instead of being written in place.
            mx.async_eval(picked)
            for layer, own in zip(self.layers, picked, strict=True):
                layer.put(own)
        self.commit(len(path))

    def trim(self, count: int) -> None:
        """Take back the last `count` committed positions.

        Raises:
            ValueError: more than there are, or further than a sliding window still holds.
        """
        length = self.length - count
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot trim {count} positions of {self.length}")
        if not self.can_trim_to(length):
            raise ValueError(f"cannot go back to {length} positions: a sliding window has dropped them")
        self.length = length
        self.tree, self.positions = None, length

    def can_trim_to(self, length: int) -> bool:
        """True where the sliding windows still hold what position `length` needs."""
        return all(
            layer.start == 0 or layer.start <= length - layer.window + 1
            for layer in self.layers
            if layer.window is not None
        )

    def settle(self) -> None:
        """Set going what is still to be written: left as it is, only the thread that asked for it could compute it.

        Raises:
            RuntimeError: another thread did.
        """
        mx.async_eval(self.arrays())

    def arrays(self) -> list[mx.array]:
        """Every buffer, to be evaluated together."""
        return [array for layer in self.layers for array in layer.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def check_bits(bits: int) -> None:
    """Check a number of bits for keys and values.

    Raises:
        ValueError: MLX does not quantize to it.
    """
    if not isinstance(bits, int) or bits not in KV_BITS:
        raise ValueError(f"kv_bits must be one of {', '.join(map(str, KV_BITS))}, not {bits!r}")


def group_size_of(model: nn.Module) -> int:
    """Run one token to find the largest group that divides the rows of keys and values of every layer.

    Raises:
        ValueError: none does.
    """
    made = make_prompt_cache(model)
    model(mx.array([[1]]), cache=made)
    sizes = {
        array.shape[-1]
        for layer in made
        for array in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(array, mx.array)
    }
    for group_size in GROUP_SIZES:
        if all(size % group_size == 0 for size in sizes):
            return group_size
    raise ValueError(
        f"kv_bits needs heads whose size is a multiple of {min(GROUP_SIZES)}, and this model's are "
        f"{', '.join(map(str, sorted(sizes)))}"
    )
