"""RoPE with a position per row, for the nodes of a token tree.

`mx.fast.rope` takes one position per batch entry, so the rows go to the batch axis and back.

Letters: N rows, D head size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx import kernels


class TreeRope(nn.Module):
    """A model's rope that also takes a vector of positions, (N,) int32, for x (1, heads, N, D).

    Args:
        inner: the model's own.
        rotations: shared by the layers of a model; None where rotations are not looked up.
    """

    def __init__(self, inner: nn.Module, rotations: kernels.Rotations | None) -> None:
        super().__init__()
        self.inner = inner
        self._rotations = rotations
        self.kind: bytes | None = (
            None  # which of the rotations is this rope's; b"": none, None: not known yet
        )

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        if isinstance(offset, int) or offset.ndim == 0:
            return self.inner(x, offset=offset, **kwargs)
        if self._rotations is not None and not kwargs:
            rotated = self._rotations.rotate(self, x, offset)
            if rotated is not None:
                return rotated
        return self.by_row(x, offset, **kwargs)

    def by_row(self, x: mx.array, offset: mx.array, **kwargs: Any) -> mx.array:
        """x (1, heads, N, D) rotated to positions (N,), by the model's own rope."""
        rows = x.transpose(2, 1, 0, 3)  # (1, heads, N, D) -> (N, heads, 1, D)
        return self.inner(rows, offset=offset, **kwargs).transpose(2, 1, 0, 3)
