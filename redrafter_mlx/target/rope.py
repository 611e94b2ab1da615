"""RoPE with a position per row, for the nodes of a token tree.

`mx.fast.rope` takes one position per batch entry, so the rows go to the batch axis and back.

Letters: N rows, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx import kernels


class RowPositions(Protocol):
    """Knows where the rows of the forward under way stand."""

    height: int
    """greatest depth of a row"""
    depth: mx.array | None

    def at(self, first: int | mx.array, rows: int) -> mx.array | None:
        """Positions (N,) of rows of which the first stands at `first`; None: consecutive ones."""


class TreeRope(nn.Module):
    """A model's rope for rows that stand where `positions` says; x is (1, heads, N, D).

    Args:
        inner: the model's own.
        rotations: shared by the layers of a model; None where rotations are not looked up.
        positions: of the model; without it only the `offset` that is handed over counts, which may be a vector (N,).
    """

    def __init__(
        self, inner: nn.Module, rotations: kernels.Rotations | None, positions: RowPositions | None = None
    ) -> None:
        super().__init__()
        self.inner = inner
        self._rotations = rotations
        self._positions = positions
        self._takes_vectors: bool | None = None  # None: not known yet
        self.kind: bytes | None = (
            None  # which of the rotations is this rope's; b"": none, None: not known yet
        )

    def __getattr__(self, name: str) -> Any:
        """The model's own rope, for models that look into it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in self:
                raise
            return getattr(self["inner"], name)

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        positions = offset if isinstance(offset, mx.array) and offset.ndim > 0 else None
        if positions is None and self._positions is not None and x.ndim == 4:
            positions = self._positions.at(offset, x.shape[2])
        if positions is None:
            return self.inner(x, offset=offset, **kwargs)
        if self._takes_vectors is None:
            self._takes_vectors = self._try_vector(x)
        if not self._takes_vectors:
            return self.by_depth(x, offset, **kwargs)
        if self._rotations is not None and not kwargs:
            rotated = self._rotations.rotate(self, x, positions)
            if rotated is not None:
                return rotated
        return self.by_row(x, positions, **kwargs)

    def by_row(self, x: mx.array, offset: mx.array, **kwargs: Any) -> mx.array:
        """x (1, heads, N, D) rotated to positions (N,), by the model's own rope."""
        rows = x.transpose(2, 1, 0, 3)  # (1, heads, N, D) -> (N, heads, 1, D)
        return self.inner(rows, offset=offset, **kwargs).transpose(2, 1, 0, 3)

    def by_depth(self, x: mx.array, offset: int | mx.array, **kwargs: Any) -> mx.array:
        """The same for a rope that takes one position alone (dynamic scaling computes with it as a number): all rows
        are rotated to every depth, and each takes its own.
        """
        assert self._positions is not None and self._positions.depth is not None
        rows, depth = x.transpose(2, 1, 0, 3), self._positions.depth
        made = [self.inner(rows, offset=offset + d, **kwargs) for d in range(self._positions.height + 1)]
        return mx.stack(made)[depth, mx.arange(depth.shape[0])].transpose(2, 1, 0, 3)

    def _try_vector(self, x: mx.array) -> bool:
        try:
            self.inner(
                mx.zeros((2, x.shape[1], 1, x.shape[3]), dtype=x.dtype),
                offset=mx.array([1, 2], dtype=mx.int32),
            )
        except (ValueError, TypeError):
            return False
        return True
