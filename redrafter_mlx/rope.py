"""RoPE with a position per row, for the nodes of a token tree.

`mx.fast.rope` takes one position per batch entry, so the rows go to the batch axis and back. On a CPU, where it is
composed of twenty operations, that is a tenth of a verification; there the rotation is looked up: it is the same for
all layers, so one of them computes it, from what the model's own rope makes of a known vector.

Letters: N rows, D head size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .device import on_gpu

Rotation = tuple[mx.array, mx.array]
"""(N, D) each: rope(x) = x * first + (x with its halves exchanged) * second"""


class TreeRope(nn.Module):
    """A model's rope that also takes a vector of positions, (N,) int32, for x (1, heads, N, D).

    Args:
        inner: the model's own.
        rotations: shared by the layers of a model: what rotates alike -> positions and their rotation.
    """

    def __init__(self, inner: nn.Module, rotations: dict[bytes, tuple[mx.array, Rotation]]) -> None:
        super().__init__()
        self.inner = inner
        self._rotations = rotations
        self._kind: bytes | None = None  # which of `rotations`; b"": none

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        if isinstance(offset, int) or offset.ndim == 0:
            return self.inner(x, offset=offset, **kwargs)
        if on_gpu() or kwargs or x.dtype != mx.float32:
            return self._by_row(x, offset, **kwargs)
        if self._kind is None:
            self._kind = self._find_kind(x.shape[-1])
        if not self._kind:
            return self._by_row(x, offset)
        known = self._rotations.get(self._kind)
        if known is None or known[0] is not offset:  # the first layer of a forward
            known = self._rotations[self._kind] = (offset, self._rotation(offset, x.shape[-1]))
        return _rotated(x, known[1])

    def _by_row(self, x: mx.array, offset: mx.array, **kwargs: Any) -> mx.array:
        rows = x.transpose(2, 1, 0, 3)  # (1, heads, N, D) -> (N, heads, 1, D)
        return self.inner(rows, offset=offset, **kwargs).transpose(2, 1, 0, 3)

    def _rotation(self, positions: mx.array, size: int) -> Rotation:
        half = size // 2
        first = mx.broadcast_to(mx.arange(size) < half, (1, 1, positions.shape[0], size)).astype(mx.float32)
        cos, sin = mx.split(self._by_row(first, positions)[0, 0], [half], axis=-1)  # of ones and zeros
        return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)

    def _find_kind(self, size: int) -> bytes:
        """What it does at some positions; b"" where that is not a rotation of the two halves of x."""
        if size % 2:
            return b""
        positions = mx.array([1, 2, 500], dtype=mx.int32)
        rotation = self._rotation(positions, size)
        x = mx.random.normal((1, 1, 3, size), key=mx.random.key(0))
        if not mx.allclose(_rotated(x, rotation), self._by_row(x, positions), atol=1e-5).item():
            return b""
        return b"".join(np.array(part).tobytes() for part in rotation)


def _rotated(x: mx.array, rotation: Rotation) -> mx.array:
    return x * rotation[0] + mx.roll(x, x.shape[-1] // 2, -1) * rotation[1]
