"""Operations with a faster implementation on a CPU; the only module that uses `redrafter_mlx.cpu`.

On a GPU, with `REDRAFTER_CPU=off`, or without the `cpu` folder each of them is MLX's own operation. The choice is made
at every call, because a program may change MLX's default device.

Letters: n rows, K inputs, O outputs.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .device import on_gpu

try:
    from .cpu import blas, exponentials, rope_table, tiles
except ImportError:
    _EXISTS = False
else:
    _EXISTS = True

SWITCH = "REDRAFTER_CPU"


def _on_cpu() -> bool:
    return _EXISTS and not on_gpu() and os.environ.get(SWITCH, "").lower() != "off"


class Weight(Protocol):
    """A constant matrix (O, K), by whose transpose inputs are multiplied."""

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""

    def dense(self) -> mx.array:
        """(O, K)"""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., O)"""


class DenseWeight:
    """A constant matrix (O, K) with MLX's own multiplication."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dense(self) -> mx.array:
        return self.weight

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T


class Rotations(Protocol):
    """RoPE's rotations at the current positions, which all layers of a model share."""

    def rotate(self, rope: Any, x: mx.array, positions: mx.array) -> mx.array | None:
        """`rope.by_row(x, positions)` from a table; None if the table does not serve this rope or x."""


def exponential(x: mx.array) -> mx.array:
    """exp(x)."""
    return exponentials.exponential(x) if _on_cpu() else mx.exp(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return exponentials.silu(x) if _on_cpu() else nn.silu(x)


def constant_weight(weight: mx.array, num_cores: int | None = None) -> Weight:
    """A matrix (O, K) that does not change, in the layout that is fastest for inputs of few rows.

    Args:
        num_cores: 1 multiplies on the caller's thread; None uses all cores.
    """
    return tiles.TiledWeight(weight, num_cores) if _on_cpu() else DenseWeight(weight)


def optimize_layout(module: nn.Module, num_cores: int | None = None) -> None:
    """Optimize the layout of `module`'s linear layers, whose weights are final, for inputs of few rows."""
    if _on_cpu():
        tiles.tile_layers(module, num_cores)


def optimize_target(model: nn.Module) -> None:
    """Use the faster implementations in `model`, a loaded target. No other model in the process changes."""
    if _on_cpu():
        from .cpu import attention  # here, because it imports mlx-lm

        attention.replace_functions(model)
        tiles.tile_layers(model)


def shared_rotations() -> Rotations | None:
    """A table for the layers of one model; None where rotations are computed row by row."""
    return rope_table.RotationTable() if _on_cpu() else None


def identity() -> list[object]:
    """The settings on which the speed of a CPU depends besides the device: the BLAS and its threads."""
    threads = sorted((key, value) for key, value in os.environ.items() if key.endswith("_NUM_THREADS"))
    return [blas.loaded() if _on_cpu() else None, threads]


def keep_freed_memory() -> None:
    """Let the process keep freed memory for the next arrays. For commands only: it changes malloc for the process."""
    if _on_cpu():
        blas.keep_freed_memory()
