"""Gumbel noise that is a function of the seed and of a token's absolute position, and of nothing else.

Letters: L positions in a row, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx


def gumbel(seed: int, positions: mx.array, vocab_size: int) -> mx.array:
    """Standard Gumbel noise, a row per absolute position. positions (L,) int32 -> (L, V) float32.

    The key of a row is (seed, position) itself: Threefry is counter-based, so that similar keys are as good as random
    ones. The upper 32 bits of a seed, times Knuth's odd multiplier, are combined with the position.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) * 2654435761 & 0xFFFFFFFF
    words = positions.astype(mx.uint32) ^ mx.array(high, dtype=mx.uint32)
    keys = mx.stack([mx.full(positions.shape, low, dtype=mx.uint32), words], axis=1)
    return mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)


class PositionNoise:
    """Gumbel noise by absolute position. Drafts overlap in their positions, and each row is computed once.

    The positions asked for are on the device, because the next draft is queued before the host knows them; the host
    gives their bounds. Rows are computed in blocks, and freed when the text has passed them.
    """

    BLOCK = 8

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed, self._vocab_size = seed, vocab_size
        self._first = 0
        self._rows: mx.array | None = None  # (n, V): positions first ... first + n - 1

    def at(self, positions: mx.array, low: int, high: int) -> mx.array:
        """Noise of positions (L,) int32, which lie in low ... high - 1; `low` never falls. -> (L, V)"""
        assert self._rows is None or low >= self._first, "rows that the text has passed are freed"
        if self._rows is None:
            self._first, self._rows = low, self._make(low, high)
        end = self._first + self._rows.shape[0]
        if high > end:
            kept = self._rows[low - self._first :]
            self._first, self._rows = low, mx.concatenate([kept, self._make(max(end, low), high)])
        return self._rows[positions - self._first]

    def _make(self, begin: int, end: int) -> mx.array:
        count = -(-(end - begin) // self.BLOCK) * self.BLOCK
        return gumbel(self._seed, mx.arange(begin, begin + count, dtype=mx.int32), self._vocab_size)
