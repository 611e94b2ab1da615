"""Keys and values of one layer, in every form that mlx-lm's models keep them.

mlx-lm's attention asks a layer's cache for three things: `offset` (the position of the first row), `make_mask` and
`update_and_fetch`. A `KeysValues` answers them so that an unmodified model verifies a token tree: the mask lets a node
attend to its ancestors alone (where the nodes stand is told by `positions`). Committed positions are 0 ... length-1;
the rows of the last forward lie behind them until a path of them is kept.

Buffers are written in place, in blocks; a rejected row costs nothing but being overwritten.

Letters: N rows of a forward, T committed positions, D head size, H key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import proxy

import mlx.core as mx

from redrafter_mlx.tree import TokenTree

BLOCK = 256  # positions a buffer grows by
Arrays = tuple[mx.array, ...]


class Shared(Protocol):
    """What the layers of one cache have in common."""

    length: int
    """committed positions"""
    tree: TokenTree | None
    """of the forward under way; None: a run of text"""
    reserved: int
    """positions that a buffer has room for when it grows"""
    bits: int | None
    group_size: int
    sees_beyond_window: bool
    """True once a model has asked for more positions than a window keeps"""
    is_replaying: bool
    """True while recurrences run again over rows that they have already read"""


class LayerState(Protocol):
    """What a layer remembers of a text between two forwards."""

    branches: bool
    """False: the rows of a forward can only be a chain"""

    def begin(self) -> None:
        """A forward is about to come: forget the rows of the last one that were not kept."""

    def gather(self, path: mx.array) -> list[mx.array]:
        """What `keep` needs to commit the rows `path` (n,) of the last forward, on the device."""

    def keep(self, gathered: Sequence[mx.array]) -> None:
        """Move the gathered rows to the front of the pending ones."""

    def commit(self, length: int) -> None:
        """The text now has `length` positions."""

    def can_trim_to(self, length: int) -> bool:
        """True where the layer can go back to the text's first `length` positions."""

    def trim_to(self, length: int) -> None:
        """Go back to the text's first `length` positions, which `can_trim_to` allows."""

    def arrays(self) -> list[mx.array]:
        """Every array, to be evaluated together."""

    def stretch(self, length: int, most: int) -> None:
        """Pretend that the text has `length` positions; see `KVCache.stretch`."""


class KeysValues:
    """Keys and values, plain or quantized, with or without a sliding window.

    A layer with a window keeps the last `window` positions and up to a block more; `start` is the position
    of its first row. Windows are enforced by the mask, so no ring buffer has to be unrolled or rewound.
    """

    branches = True

    def __init__(self, shared: Shared, window: int | None = None) -> None:
        self._shared = proxy(shared)  # no cycle: else its memory would wait for Python's garbage collector
        self.window = window
        self.start = 0
        self.num_rows = 0  # committed and pending rows in the buffers
        self.keys: mx.array | Arrays | None = None  # some of mlx-lm's models replace both
        self.values: mx.array | Arrays | None = None
        if shared.bits is not None:  # mlx-lm's attention takes the quantized path where a cache has `bits`
            self.bits = shared.bits
            self.group_size = shared.group_size

    @property
    def offset(self) -> int:
        """Position of the first row of the forward under way."""
        return self._shared.length

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """(N, rows) bool, or mlx-lm's short forms for a causal mask."""
        length, tree = self._shared.length, self._shared.tree
        window, floor = self._window(window_size, N)
        windowed = window is not None and length + N > window
        if tree is None or tree.is_chain:
            if not windowed and (N == 1 or not return_array):
                return None if N == 1 else "causal"
            depth = mx.arange(N, dtype=mx.int32)
            own = depth[:, None] >= depth
        else:
            assert tree.mask is not None
            depth, own = tree.depth, tree.mask
        past = mx.arange(self.start, length, dtype=mx.int32)
        seen = mx.ones((N, past.shape[0]), dtype=mx.bool_)
        if window is not None and windowed:
            seen = ((length + depth)[:, None] - past < window) & (past >= floor)
            own = own & (depth[:, None] - depth < window)
        return mx.concatenate([seen, own], axis=1)

    def _window(self, asked: int | None, N: int) -> tuple[int | None, int]:
        """Positions that a row sees, itself among them, and the first one that any row does.

        A model may ask for more than its layers keep (PLaMo 3 for one more). mlx-lm then gives a run of text what is
        asked for, of the `window` - 1 positions before the run, and a decoded row what is kept.
        """
        if asked is None or self.window is None or asked <= self.window:
            return asked or self.window, 0
        self._shared.sees_beyond_window = True
        if self._shared.tree is None and N > 1:
            return asked, self._shared.length - self.window + 1
        return self.window, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append N rows behind the committed ones. (1, H, N, D) -> all rows (1, H, T+N, D)."""
        if self._shared.is_replaying:  # the rows are here, and nobody looks at the attention
            return self._encoded(keys), self._encoded(values)
        pending = keys.shape[2]
        first = self._shared.length - self.start
        self.keys = self._write(self.keys, keys, first)
        self.values = self._write(self.values, values, first)
        self.num_rows = first + pending
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """All rows, those of the forward under way among them, for layers that share them."""
        return self._rows(self.keys), self._rows(self.values)

    def _rows(self, buffers: mx.array | Arrays | None) -> Any:
        cut = [array[..., : self.num_rows, :] for array in _parts(buffers)]
        return tuple(cut) if isinstance(buffers, tuple) else cut[0]

    def _write(self, held: mx.array | Arrays | None, rows: mx.array, first: int) -> mx.array | Arrays:
        encoded = self._encoded(rows)
        parts = _parts(encoded)
        end = first + rows.shape[2]
        buffers = _parts(held)
        if not buffers or end > buffers[0].shape[2]:
            buffers = self._grown(buffers, parts, first, end)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[..., first:end, :] = part
        return tuple(buffers) if isinstance(encoded, tuple) else buffers[0]

    def _encoded(self, rows: mx.array) -> mx.array | Arrays:
        """Rows as they are kept."""
        if self._shared.bits is None:
            return rows
        return tuple(mx.quantize(rows, group_size=self.group_size, bits=self.bits))

    def _grown(
        self, buffers: Sequence[mx.array], rows: Sequence[mx.array], first: int, end: int
    ) -> list[mx.array]:
        wanted = end if self.window is not None else max(end, self._shared.reserved)
        capacity = -(-wanted // BLOCK) * BLOCK
        grown = []
        for index, row in enumerate(rows):
            shape = (*row.shape[:2], capacity - (first if buffers else 0), row.shape[3])
            tail = mx.zeros(shape, dtype=row.dtype)
            grown.append(mx.concatenate([buffers[index][..., :first, :], tail], axis=2) if buffers else tail)
        return grown

    def begin(self) -> None:
        """Nothing to do: pending rows are overwritten."""

    def gather(self, path: mx.array) -> list[mx.array]:
        """The pending rows `path` (n,), of every buffer."""
        rows = path + (self._shared.length - self.start)
        return [mx.take(buffer, rows, axis=2) for buffer in self.arrays()]

    def keep(self, gathered: Sequence[mx.array]) -> None:
        first = self._shared.length - self.start
        for buffer, rows in zip(self.arrays(), gathered, strict=True):
            buffer[..., first : first + rows.shape[2], :] = rows

    def commit(self, length: int) -> None:
        """Forget rows that no later position can attend to, a block at a time."""
        surplus = self._needs_from(length) - self.start
        if surplus >= BLOCK:
            self._drop(surplus)

    def _needs_from(self, length: int) -> int:
        """The first position that a row at `length` or later can attend to, or one before it."""
        return 0 if self.window is None else max(0, length - self.window)

    def _drop(self, count: int) -> None:
        for name in ("keys", "values"):
            held = getattr(self, name)
            cut = [array[..., count:, :] for array in _parts(held)]
            setattr(self, name, tuple(cut) if isinstance(held, tuple) else cut[0])
        self.start += count
        self.num_rows -= count

    def can_trim_to(self, length: int) -> bool:
        return self.start == 0 or self.window is None or self.start <= length - self.window + 1

    def trim_to(self, length: int) -> None:
        """Nothing to do: rows behind `length` are overwritten."""

    def arrays(self) -> list[mx.array]:
        return [*_parts(self.keys), *_parts(self.values)]

    def stretch(self, length: int, most: int) -> None:
        """Repeat and disturb the rows that there are; at most `most` are kept, but all that a window needs."""
        if self.keys is None:
            return
        held = min(length, max(most, length - self._needs_from(length) + 1 if self.window else most))
        for name in ("keys", "values"):
            buffers = getattr(self, name)
            many = [_repeated(array[..., : self.num_rows, :], held) for array in _parts(buffers)]
            setattr(self, name, tuple(many) if isinstance(buffers, tuple) else many[0])
        self.start, self.num_rows = length - held, held


class ChunkedKeysValues(KeysValues):
    """Keys and values of a layer whose rows attend within their chunk of the text (Llama 4).

    The model itself makes the mask, from the order of the rows: chains only.
    """

    branches = False

    def __init__(self, shared: Shared, chunk: int) -> None:
        super().__init__(shared)
        self.chunk = chunk

    @property
    def start_position(self) -> int:
        return self.start

    def maybe_trim_front(self) -> None:
        """Nothing to do: old rows are dropped when others are committed."""

    def _needs_from(self, length: int) -> int:
        return length // self.chunk * self.chunk

    def can_trim_to(self, length: int) -> bool:
        return self.start <= self._needs_from(length)

    def stretch(self, length: int, most: int) -> None:
        super().stretch(length, max(most, length - self._needs_from(length)))


def _parts(buffers: mx.array | Arrays | None) -> list[mx.array]:
    if buffers is None:
        return []
    return list(buffers) if isinstance(buffers, tuple) else [buffers]


def _repeated(rows: mx.array, count: int) -> mx.array:
    """(1, H, n, D) -> (1, H, count, D): row after row, from the first again after the last, no two of them alike."""
    many = mx.take(rows, mx.arange(count) % rows.shape[2], axis=2)
    if not mx.issubdtype(rows.dtype, mx.floating) or not rows.size:
        return many
    noise = mx.random.normal(many.shape, key=mx.random.key(count)) * rows.astype(mx.float32).std()
    return (many + noise).astype(rows.dtype)
