"""RoPE by a table: cos and sin of a forward's positions are computed once and shared by all layers of a model.

`mx.fast.rope` is composed of twenty operations on MLX's CPU backend, a tenth of a verification. Applying the model's
own rope to a constant vector gives the cosines and sines it would use, whatever its base or scaling.

Letters: N rows, D head size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Rotation = tuple[mx.array, mx.array]
"""(N, D) each: rope(x) = x * first + (x with its halves exchanged) * second"""


class RotationTable:
    """The rotations of the forward under way, by what a rope does to a known vector: layers may differ in it."""

    def __init__(self) -> None:
        self._rotations: dict[bytes, tuple[mx.array, Rotation]] = {}

    def rotate(self, rope: Any, x: mx.array, positions: mx.array) -> mx.array | None:
        """`rope.by_row(x, positions)` for x (1, heads, N, D) and positions (N,), as the table has it.

        None where the rope is no rotation of the two halves of x, or x is not float32.
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
    """What the rope does at some positions; b"" where that is not a rotation of the two halves of x."""
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
