"""Products of a few rows with a large matrix, on a CPU: as fast as the weights can be read, by every core.

MLX's CPU backend runs a stream on one thread and hands products to the BLAS. OpenBLAS shares a product among
threads only after copying the whole weight matrix in another order, which for a few rows takes longer than the
product; small products it computes in place, on the caller's thread. So a second copy of a matrix is kept, cut into
tiles of outputs narrow enough for that kernel, each of which is read in the order in which it lies in memory: up to
eight rows then take hardly longer than one. The tiles are dealt to as many streams as OpenBLAS has threads. The
matrix itself stays, for longer inputs. Figures: docs/performance.md. On a GPU, and with another BLAS, all of this is
off.

Letters: n rows, K inputs, O outputs, r outputs in a tile, B tiles of a stream.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from . import BLAS, blas
from .device import on_gpu

_log = logging.getLogger("redrafter_mlx")

# OpenBLAS, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c: products that are computed in place
KERNELS = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")
SMALL_OUTPUT, SMALL_PRODUCT, SMALL_INPUT = 1200, 100**3, 32  # at most n O, at most n O K, at least K

MAX_ROWS = 16  # beyond, sharing what was copied pays
TILES = (64, 32, 16)  # outputs; the widest one that allows WANTED_ROWS
WANTED_ROWS = 12
SHARED_FROM = 400_000  # weights; below, waking another thread takes longer than it saves
MEMORY = 0.25  # of the machine's, that the copies of one model may take


@cache
def _streams() -> tuple[mx.ThreadLocalStream | None, ...]:
    """The streams to share products among, the caller's own (None) first; empty where products are left alone."""
    threads = blas.openblas_threads(BLAS, KERNELS)
    return (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(threads - 1))) if threads else ()


class Product:
    """x -> x @ weight.T for a weight (O, K) that does not change; not `shared`: on the caller's thread alone."""

    def __init__(self, weight: mx.array, shared: bool = True) -> None:
        self.weight = weight
        self._shared = shared and weight.size >= SHARED_FROM
        self._inputs = weight.shape[1]
        self._tile, self._most_rows = (0, 0) if on_gpu() or not _streams() else _tile(weight)
        self._tiles: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., O)"""
        tiles = self.tiles(x)
        return in_tiles(x, tiles) if tiles else x @ self.weight.T

    def dense(self) -> mx.array:
        """The weight."""
        return self.weight

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.weight.nbytes

    def tiles(self, x: mx.array) -> list[mx.array]:
        """The weights as tiles (B, K, r) for every stream, made at first use; none where x has too many rows, or
        the weights cannot be cut."""
        if not 0 < x.size // self._inputs <= self._most_rows:
            return []
        if not self._tiles:
            self._tiles = _cut(self.weight, self._tile, len(_streams()) if self._shared else 1)
        return self._tiles


def _tile(weight: mx.array) -> tuple[int, int]:
    """Outputs in a tile, and the most rows for which such a product is small; 0, 0 where none is."""
    outputs, inputs = weight.shape
    widths = [r for r in TILES if outputs % r == 0]
    if weight.dtype != mx.float32 or inputs < SMALL_INPUT or not widths:
        return 0, 0

    def rows(r: int) -> int:
        return min(MAX_ROWS, SMALL_OUTPUT // r, SMALL_PRODUCT // (r * inputs))

    r = next((r for r in widths if rows(r) >= WANTED_ROWS), widths[-1])
    return r, rows(r)


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
    _product: Product

    def __call__(self, x: mx.array) -> mx.array:
        current = self._product.weight is self.weight  # not so once the layer was updated
        tiles = self._product.tiles(x) if current else []
        if not tiles:
            return super().__call__(x)
        out = in_tiles(x, tiles)
        return out + self.bias if "bias" in self else out


class _Embedding(nn.Embedding):
    """Tied: also the output head."""

    _product: Product

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x) if self._product.weight is self.weight else super().as_linear(x)


def tile_products(module: nn.Module, shared: bool = True) -> None:
    """Have the linear layers of `module`, and its embeddings as output heads, compute few rows in this way; unless
    the copies would take more than `MEMORY`, which is said. Not `shared`: on the caller's thread alone.

    Their class is replaced by a subclass, their weights stay. A layer whose weight is replaced later goes back
    to MLX's product.
    """
    if on_gpu() or not _streams():
        return
    layers = [m for m in module.modules() if type(m) in (nn.Linear, nn.Embedding, _Linear, _Embedding)]
    copies = sum(layer.weight.nbytes for layer in layers if _tile(layer.weight)[0])
    if copies > MEMORY * _memory():
        _log.warning(
            "products of few rows are left to MLX, which is slower here: a second copy of the weights, "
            "%.1f GB, is more than %d%% of this machine's memory", copies / 1e9, 100 * MEMORY
        )  # fmt: skip
        return
    for layer in layers:
        layer.__class__ = _Linear if isinstance(layer, nn.Linear) else _Embedding
        layer._product = Product(layer.weight, shared)


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
