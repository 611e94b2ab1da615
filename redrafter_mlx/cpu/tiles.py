"""Products of a few rows with a large matrix: as fast as the weights can be read, by every core.

MLX's CPU backend runs a stream on one thread and hands products to the BLAS. OpenBLAS shares a product among
threads only after copying the whole weight matrix in another order, which for a few rows takes longer than the
product; small products it computes in place, on the caller's thread. So a second copy of a matrix is kept, cut into
tiles of outputs narrow enough for that kernel, each of which is read in the order in which it lies in memory: up to
eight rows then take hardly longer than one. The tiles are dealt to as many streams as OpenBLAS has threads. The
matrix itself stays, for longer inputs. Figures: docs/notes/cpu.md. With another BLAS all of this is off.

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

# OpenBLAS, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c: products that are computed in place
KERNELS = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")
SMALL_OUTPUT, SMALL_PRODUCT, SMALL_INPUT = 1200, 100**3, 32  # at most n O, at most n O K, at least K

MAX_ROWS = 16  # beyond, the BLAS' own way of sharing a product is faster
TILE_SIZES = (64, 32, 16)  # outputs; the widest one that allows ENOUGH_ROWS
ENOUGH_ROWS = 12
SHARED_FROM = 400_000  # weights; below, waking another thread takes longer than it saves
MEMORY_SHARE = 0.25  # of the memory there is, that the copies of one model may take


@cache
def _streams() -> tuple[mx.ThreadLocalStream | None, ...]:
    """The streams to share products among, the caller's own (None) first; empty with another BLAS."""
    threads = blas.openblas_threads(blas.loaded(), KERNELS)
    return (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(threads - 1))) if threads else ()


class TiledWeight:
    """A constant weight (O, K) with a tiled copy for inputs of at most 16 rows, made at the first use.

    Args:
        num_cores: 1 keeps products on the caller's thread; None shares large ones among all.
    """

    def __init__(self, weight: mx.array, num_cores: int | None = None) -> None:
        self.weight = weight
        self._parts = len(_streams()) if num_cores is None and weight.size >= SHARED_FROM else 1
        self._inputs = weight.shape[1]
        self._tile_size, self._max_rows = _tile_size(weight) if _streams() else (0, 0)
        self._tiles: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., O)"""
        tiles = self.tiles(x)
        return in_tiles(x, tiles) if tiles else x @ self.weight.T

    def dense(self) -> mx.array:
        """(O, K)"""
        return self.weight

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.weight.nbytes

    def tiles(self, x: mx.array) -> list[mx.array]:
        """The weights as tiles (B, K, r) for every stream; none where x has too many rows or the weights cannot be
        cut.
        """
        if not 0 < x.size // self._inputs <= self._max_rows:
            return []
        if not self._tiles:
            self._tiles = _cut(self.weight, self._tile_size, self._parts)
        return self._tiles


def _tile_size(weight: mx.array) -> tuple[int, int]:
    """Outputs in a tile, and the most rows for which such a product is small; 0, 0 where none is."""
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
    """(..., K) times tiles (B, K, r) -> (..., O)."""
    rows = x.reshape(1, -1, x.shape[-1])
    shares = [mx.matmul(rows, part, stream=s) for part, s in zip(tiles, _streams(), strict=False)]
    shares = [share.swapaxes(0, 1) for share in shares]  # (B, n, r) -> (n, B, r)
    out = mx.concatenate(shares, axis=1) if len(shares) > 1 else shares[0]
    return out.reshape(*x.shape[:-1], -1)


class _Linear(nn.Linear):
    _tiled: TiledWeight

    def __call__(self, x: mx.array) -> mx.array:
        current = self._tiled.weight is self.weight  # not so once the layer was updated
        tiles = self._tiled.tiles(x) if current else []
        if not tiles:
            return super().__call__(x)
        out = in_tiles(x, tiles)
        return out + self.bias if "bias" in self else out


class _Embedding(nn.Embedding):
    """Tied: also the output head."""

    _tiled: TiledWeight

    def as_linear(self, x: mx.array) -> mx.array:
        return self._tiled(x) if self._tiled.weight is self.weight else super().as_linear(x)


def tile_layers(module: nn.Module, num_cores: int | None = None) -> None:
    """Use tiled weights in every linear layer of `module`, and in its embeddings as output heads. Skipped, with a
    warning, if the copies would exceed 25 % of memory.

    The layers' class is replaced by a subclass, their weights stay. A layer whose weight is replaced later goes back
    to MLX's product.
    """
    if not _streams():
        _log.info("few-row products stay with MLX: tiled weights need OpenBLAS with its kernels for AVX-512")
        return
    layers = [m for m in module.modules() if type(m) in (nn.Linear, nn.Embedding, _Linear, _Embedding)]
    copies = sum(layer.weight.nbytes for layer in layers if _tile_size(layer.weight)[0])
    if copies > MEMORY_SHARE * memory_bytes():
        _log.warning(
            "few-row products stay with MLX, which is slower here: a second copy of the weights, "
            "%.1f GB, is more than %d%% of the memory there is", copies / 1e9, 100 * MEMORY_SHARE
        )  # fmt: skip
        return
    for layer in layers:
        layer.__class__ = _Linear if isinstance(layer, nn.Linear) else _Embedding
        layer._tiled = TiledWeight(layer.weight, num_cores)
