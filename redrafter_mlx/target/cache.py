"""The cache of one text: a `LayerState` for every layer of a model, and the one number they share, `length`.

Committed positions are 0 ... length-1; the rows of the last forward wait behind them until `keep` commits a path of
them. What a layer keeps is said by mlx-lm's own cache for it: keys and values (`keys_values`), which take a tree, or a
recurrent state (`recurrent`), which takes a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.cache import KVCache as PlainKVCache

from redrafter_mlx.tree import TokenTree

from .keys_values import ChunkedKeysValues, KeysValues, LayerState
from .recurrent import Call, Recorder, RecurrentState

KV_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32)  # values that share a scale, as mx.quantize has them
MOST_MARKS = 4  # states that a text can go back to; each is as large as all recurrent states


class Follower(Protocol):
    """What else is known of the committed positions, and must not outlast them."""

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""

    def launch(self) -> None:
        """As `KVCache.launch`."""


class KVCache:
    """What all layers remember of a text.

    Args:
        made: mlx-lm's own caches for the model, empty.
        name: of the model, for messages.
        bits, group_size: how keys and values are quantized; None: not at all. See `check_bits`, `group_size_of`.

    Raises:
        ValueError: a layer keeps something that can neither take a tree nor a chain.
    """

    def __init__(
        self, made: Sequence[Any], name: str, bits: int | None = None, group_size: int = max(GROUP_SIZES)
    ) -> None:
        self.length = 0
        self.bits = bits
        self.group_size = group_size
        self.reserved = 0
        self.tree: TokenTree | None = None
        self.is_replaying = False
        self.sees_beyond_window = False
        self.followers: list[Follower] = []
        """cut back with the cache, and gone with it"""
        self.recorder: Recorder | None = None
        self.calls: list[Call] = []
        """of recurrent modules in the last forward, if it was a tree's"""
        self._start, self._rows = 0, 0  # of the last forward
        self.layers = [self._state(each, f"layer {index} of {name}") for index, each in enumerate(made)]
        """as the model takes them"""
        self.states: list[LayerState] = list(_leaves(self.layers))
        self._recurrent = [state for state in self.states if isinstance(state, RecurrentState)]

    @classmethod
    def of(cls, model: nn.Module, bits: int | None = None, group_size: int = max(GROUP_SIZES)) -> KVCache:
        """A cache for `model` (mlx-lm's), a state for every one that the model itself would make.

        Raises:
            ValueError: as the class, or `bits` for a model that keeps no keys and values.
        """
        cache = cls(make_prompt_cache(model), type(model).__module__, bits, group_size)
        if bits is not None and not any(isinstance(state, KeysValues) for state in cache.states):
            raise ValueError(f"kv_bits needs keys and values, and {type(model).__module__} keeps none")
        return cache

    def _state(self, made: Any, where: str) -> Any:
        if type(made) is PlainKVCache:
            return KeysValues(self)
        if type(made) is RotatingKVCache and made.keep == 0:
            return KeysValues(self, made.max_size)
        if type(made) is ChunkedKVCache:
            return ChunkedKeysValues(self, made.chunk_size)
        if type(made) is ArraysCache:
            return RecurrentState(len(made.cache))
        if type(made) is CacheList:
            return CacheList(*(self._state(each, where) for each in made.caches))
        kind = (
            "RotatingKVCache that keeps its first rows"
            if type(made) is RotatingKVCache
            else type(made).__name__
        )
        raise ValueError(
            f"{where} keeps a {kind}; keys and values (plain, in a window or in chunks) and the states of recurrent "
            "layers can be verified"
        )

    @property
    def follows_one_path(self) -> str:
        """Why only chains can be verified; empty where every layer takes a tree."""
        single = [type(state) for state in self.states if not state.branches]
        if not single:
            return ""
        what = "a recurrent state" if RecurrentState in single else "its attention in chunks"
        return f"{what} follows one path ({len(single)} of {len(self.states)} layer states)"

    def reserve(self, length: int) -> None:
        """Allocate buffers for at least `length` positions at the next growth, so that none follows."""
        self.reserved = max(self.reserved, length)

    def begin(self, tree: TokenTree | None) -> None:
        """Announce the rows of the next forward: a tree's nodes, or None for a run of text."""
        self.tree, self.calls = tree, []
        self._start, self._rows = self.length, 0 if tree is None else tree.num_nodes
        for state in self.states:
            state.begin()

    @property
    def records(self) -> list[Call] | None:
        """Where the recurrent modules of the forward under way are noted; None where no row can be rejected."""
        return self.calls if self._recurrent and self._rows > 1 else None

    def commit(self, count: int) -> None:
        """Commit the first `count` pending rows (a run of text, or the front of a tree)."""
        if self._recurrent and count < self._rows:
            self._replay(count)
        self.length += count
        self.tree = None
        for state in self.states:
            state.commit(self.length)

    def keep(self, path: Sequence[int]) -> None:
        """Commit the nodes of `path`, root first. A path of the first rows is a trim, any other one gather."""
        if any(node != row for row, node in enumerate(path)):
            rows = mx.array(list(path), dtype=mx.int32)
            gathered = [state.gather(rows) for state in self.states]
            # Set going before the buffers are written: a buffer that an unlaunched operation still reads
            # would be copied whole instead of being written in place.
            mx.async_eval(gathered)
            for state, own in zip(self.states, gathered, strict=True):
                state.keep(own)
        self.commit(len(path))

    def _replay(self, count: int) -> None:
        """Have the recurrent states those after the first `count` rows of the last forward."""
        assert self.recorder is not None
        for rewound in self._recurrent:
            rewound.rewind()
        self.is_replaying = True
        try:
            self.recorder.replay(self.calls, self._rows, count)
        finally:
            self.is_replaying = False

    def trim(self, count: int) -> None:
        """Take back the last `count` committed positions.

        Raises:
            ValueError: more than there are, or further than the layers can go back.
        """
        length = self.length - count
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot trim {count} positions of {self.length}")
        if not self.can_trim_to(length):
            if all(state.can_trim_to(length) for state in self._recurrent):
                raise ValueError(f"cannot go back to {length} positions: a sliding window has dropped them")
            raise ValueError(
                f"cannot go back to {length} positions: a recurrent state cannot, but for marked lengths"
            )
        if self._is_in_last_forward(length):
            self._replay(length - self._start)
            for replayed in self._recurrent:
                replayed.commit(length)
        self.length, self.tree = length, None
        for state in self.states:
            state.trim_to(length)
        for follower in self.followers:
            follower.trim(length)

    def can_trim_to(self, length: int) -> bool:
        """True where the sliding windows still hold what position `length` needs, and recurrent states go back to it:
        into the last forward, or to a length that was marked.
        """
        can_replay = self._is_in_last_forward(length)
        return all(
            state.can_trim_to(length) or (can_replay and isinstance(state, RecurrentState))
            for state in self.states
        )

    def _is_in_last_forward(self, length: int) -> bool:
        """True where the recurrent states at `length` can be had by a replay, and only so."""
        return bool(self.calls) and self._start < length < self.length <= self._start + self._rows

    def mark(self) -> None:
        """Remember the recurrent states at this length, so that the text can be trimmed to it later."""
        for state in self._recurrent:
            state.mark(MOST_MARKS)
        mx.async_eval([state.arrays() for state in self._recurrent])

    def reach(self, length: int) -> int:
        """The greatest length up to `length` that the cache can be trimmed to; 0 where there is none."""
        if self.can_trim_to(length):
            return length
        if not self._recurrent:
            return 0
        marks = [each for each in self._recurrent[0].marks if each <= length and self.can_trim_to(each)]
        return max(marks, default=0)

    def launch(self) -> None:
        """Set going what is still to be written: left as it is, only the thread that asked for it could compute it.

        Raises:
            RuntimeError: another thread did.
        """
        mx.async_eval(self.arrays())
        for follower in self.followers:
            follower.launch()

    def stretch(self, length: int, most: int) -> None:
        """Pretend that the text has `length` positions, whose rows are those that there are, over and over, disturbed
        so that no two are alike. For checks of what a model does far into a text, without the time to get there.

        Args:
            most: rows of a layer without a window that are kept.
        """
        for state in self.states:
            state.stretch(length, most)
        self.length = length

    def arrays(self) -> list[mx.array]:
        """Every array, to be evaluated together."""
        return [array for state in self.states for array in state.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def _leaves(layers: Sequence[Any]) -> Iterator[LayerState]:
    for layer in layers:
        if type(layer) is CacheList:
            yield from _leaves(layer.caches)
        else:
            yield layer


def check_bits(bits: int) -> None:
    """Check a number of bits for keys and values.

    Raises:
        ValueError: MLX does not quantize to it.
    """
    if not isinstance(bits, int) or bits not in KV_BITS:
        raise ValueError(f"kv_bits must be one of {', '.join(map(str, KV_BITS))}, not {bits!r}")


def group_size_of(model: nn.Module, run: Callable[[KVCache], object]) -> int:
    """Find the largest group that divides the rows of keys and values of every layer, and try it.

    Args:
        run: runs a few rows of `model` on a cache.

    Raises:
        ValueError: none does, or the model's attention does not take quantized keys and values.
    """
    cache = KVCache.of(model)
    run(cache)
    sizes = {
        array.shape[-1] for state in cache.states if isinstance(state, KeysValues) for array in state.arrays()
    }
    for group_size in GROUP_SIZES:
        if all(size % group_size == 0 for size in sizes):
            break
    else:
        raise ValueError(
            f"kv_bits needs heads whose size is a multiple of {min(GROUP_SIZES)}, and this model's are "
            f"{', '.join(map(str, sorted(sizes)))}"
        )
    quantized = KVCache.of(model, max(KV_BITS), group_size)
    try:
        run(quantized)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(
            f"kv_bits cannot serve {type(model).__module__}: its attention takes no quantized keys and values ({words})"
        ) from None
    return group_size
