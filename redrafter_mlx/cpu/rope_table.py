"""RoPE by a table: cos and sin of a forward's positions are computed once and shared by all layers of a model.

On MLX's CPU backend `mx.fast.rope` is composed of twenty operations, which take a tenth of a verification. The model's
own rope, applied to a constant vector, gives the cosines and sines that it uses, whatever its base or scaling.

Letters: N rows, D head size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Rotation = tuple[mx.array, mx.array]
"""(N, D) each: rope(x) = x * first + (x with its halves exchanged) * second"""


class RotationTable:
    """The rotations of the current forward, one for each distinct rope: the layers of a model may differ in it."""

    def __init__(self) -> None:
        self._rotations: dict[bytes, tuple[mx.array, Rotation]] = {}

    def rotate(self, rope: Any, x: mx.array, positions: mx.array) -> mx.array | None:
        """`rope.by_row(x, positions)` for x (1, heads, N, D) and positions (N,), computed from the table.

        None if the rope does not rotate the two halves of x against each other, or x is not float32.
        """
        if x.dtype != mx.float32:
            return None
        if rope.kind is None:
            rope.kind = _find_kind(rope, x.shape[-1])
        if not rope.kind:
            return None
        known = self._rotations.get(rope.kind)
        if known is None or known[0] is not positions:  # the first layer of a forward
            known = self._rotations[rope.kind] = (positions, _rotation(rope, positions, x.shape[-1]))
        return _rotated(x, known[1])


def _rotation(rope: Any, positions: mx.array, size: int) -> Rotation:
    half = size // 2
    first = mx.broadcast_to(mx.arange(size) < half, (1, 1, positions.shape[0], size)).astype(mx.float32)
    cos, sin = mx.split(rope.by_row(first, positions)[0, 0], [half], axis=-1)  # of ones and zeros
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)


def _find_kind(rope: Any, size: int) -> bytes:
    """A key for equal ropes, their rotations at three positions; b"" if the rope does not rotate the halves of x."""
    if size % 2:
        return b""
    positions = mx.array([1, 2, 500], dtype=mx.int32)
    rotation = _rotation(rope, positions, size)
    x = mx.random.normal((1, 1, 3, size), key=mx.random.key(0))
    if not mx.allclose(_rotated(x, rotation), rope.by_row(x, positions), atol=1e-5).item():
        return b""
    return b"".join(np.array(part).tobytes() for part in rotation)


def _rotated(x: mx.array, rotation: Rotation) -> mx.array:
    return x * rotation[0] + mx.roll(x, x.shape[-1] // 2, -1) * rotation[1]
