"""Tiled weights: matrix multiplication of a few rows on all cores, limited only by the reading of the weights.

MLX's CPU backend runs a stream on one thread and leaves matrix multiplication to the BLAS. OpenBLAS uses several
threads only after copying the whole weight matrix in another order, which for a few rows takes longer than the
multiplication; small ones it computes without a copy, on the caller's thread. Therefore a second copy of each matrix
is kept, cut into tiles of outputs that are narrow enough for the kernel of small ones and contiguous in memory: eight
rows then take hardly longer than one. The tiles are distributed over as many streams as OpenBLAS has threads. The
matrix itself stays, for inputs of more rows. Figures: docs/notes/cpu.md. With another BLAS nothing is tiled.

Letters: n rows, K inputs, O outputs, r outputs in a tile, B tiles of a stream.
"""

from __future__ import annotations

import logging
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.device import memory_bytes

from . import blas

_log = logging.getLogger("redrafter_mlx")

# OpenBLAS, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c: multiplications that need no copy of the weights
KERNELS = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")
SMALL_OUTPUT, SMALL_PRODUCT, SMALL_INPUT = 1200, 100**3, 32  # at most n O, at most n O K, at least K

MAX_ROWS = 16  # for more rows the threads of the BLAS are faster
TILE_SIZES = (64, 32, 16)  # outputs; the widest one that allows ENOUGH_ROWS
ENOUGH_ROWS = 12
SHARED_FROM = 400_000  # weights of a matrix; smaller ones are not worth waking another thread
MEMORY_SHARE = 0.25  # of memory, at most, for the copies of one model


@cache
def _streams() -> tuple[mx.ThreadLocalStream | None, ...]:
    """The streams that share a multiplication, the caller's own (None) first; empty with another BLAS."""
    threads = blas.openblas_threads(blas.loaded(), KERNELS)
    return (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(threads - 1))) if threads else ()


class TiledWeight:
    """A constant weight (O, K) with a tiled copy for inputs of at most 16 rows, made at the first use.

    Args:
        num_cores: 1 multiplies on the caller's thread; None shares large matrices among all cores.
    """

    def __init__(self, weight: mx.array, num_cores: int | None = None) -> None:
        self.weight = weight
        self._parts = len(_streams()) if num_cores is None and weight.size >= SHARED_FROM else 1
        self._inputs = weight.shape[1]
        self._tile_size, self._max_rows = _tile_size(weight) if _streams() else (0, 0)
        self._tiles: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., K) times the transposed weight -> (..., O)"""
        tiles = self.tiles(x)
        return in_tiles(x, tiles) if tiles else x @ self.weight.T

    def dense(self) -> mx.array:
        """(O, K)"""
        return self.weight

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""
        return self.weight.nbytes

    def tiles(self, x: mx.array) -> list[mx.array]:
        """Tiles (B, K, r) for every stream; empty if x has too many rows or the weights cannot be tiled."""
        if not 0 < x.size // self._inputs <= self._max_rows:
            return []
        if not self._tiles:
            self._tiles = _cut(self.weight, self._tile_size, self._parts)
        return self._tiles


def _tile_size(weight: mx.array) -> tuple[int, int]:
    """Outputs r of a tile, and the most rows of an input that OpenBLAS counts as small; 0, 0 if there are none."""
    outputs, inputs = weight.shape
    sizes = [r for r in TILE_SIZES if outputs % r == 0]
    if weight.dtype != mx.float32 or inputs < SMALL_INPUT or not sizes:
        return 0, 0

    def max_rows(r: int) -> int:
        return min(MAX_ROWS, SMALL_OUTPUT // r, SMALL_PRODUCT // (r * inputs))

    r = next((r for r in sizes if max_rows(r) >= ENOUGH_ROWS), sizes[-1])
    return r, max_rows(r)


def _cut(weight: mx.array, r: int, parts: int) -> list[mx.array]:
    outputs, inputs = weight.shape
    tiles = mx.contiguous(weight.reshape(outputs // r, r, inputs).swapaxes(1, 2))
    share = -(-tiles.shape[0] // parts)
    shares = [tiles[begin : begin + share] for begin in range(0, tiles.shape[0], share)]
    mx.eval(shares)
    return shares


def in_tiles(x: mx.array, tiles: list[mx.array]) -> mx.array:
    """x (..., K) times the tiles (B, K, r) of every stream -> (..., O)."""
    rows = x.reshape(1, -1, x.shape[-1])
    shares = [mx.matmul(rows, part, stream=s) for part, s in zip(tiles, _streams(), strict=False)]
    shares = [share.swapaxes(0, 1) for share in shares]  # (B, n, r) -> (n, B, r)
    out = mx.concatenate(shares, axis=1) if len(shares) > 1 else shares[0]
    return out.reshape(*x.shape[:-1], -1)


class _Linear(nn.Linear):
    _tiled: TiledWeight

    def __call__(self, x: mx.array) -> mx.array:
        current = self._tiled.weight is self.weight  # False once the layer was updated
        tiles = self._tiled.tiles(x) if current else []
        if not tiles:
            return super().__call__(x)
        out = in_tiles(x, tiles)
        return out + self.bias if "bias" in self else out


class _Embedding(nn.Embedding):
    """An embedding that is the output head too."""

    _tiled: TiledWeight

    def as_linear(self, x: mx.array) -> mx.array:
        return self._tiled(x) if self._tiled.weight is self.weight else super().as_linear(x)


def tile_layers(module: nn.Module, num_cores: int | None = None) -> None:
    """Use tiled weights in every linear layer of `module`, and in its embeddings as output heads. Skipped, with a
    warning, if the copies would exceed 25 % of memory.

    The layers' classes are replaced by subclasses; their weights stay. A layer whose weight is replaced later uses
    MLX's own multiplication again.
    """
    if not _streams():
        _log.info(
            "weights are not tiled, and several rows cost more: tiling needs OpenBLAS with AVX-512 kernels"
        )
        return
    layers = [m for m in module.modules() if type(m) in (nn.Linear, nn.Embedding, _Linear, _Embedding)]
    copies = sum(layer.weight.nbytes for layer in layers if _tile_size(layer.weight)[0])
    if copies > MEMORY_SHARE * memory_bytes():
        _log.warning(
            "weights are not tiled, so that several rows cost more: a second copy of them, %.1f GB, "
            "is more than %d%% of memory", copies / 1e9, 100 * MEMORY_SHARE
        )  # fmt: skip
        return
    for layer in layers:
        layer.__class__ = _Linear if isinstance(layer, nn.Linear) else _Embedding
        layer._tiled = TiledWeight(layer.weight, num_cores)
