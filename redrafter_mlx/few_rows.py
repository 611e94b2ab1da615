"""Products of a few rows with a large matrix, on a CPU: every core reads its share of the weights.

MLX's CPU backend runs a stream on one thread and hands products to the BLAS. OpenBLAS shares a product among
threads only after copying the whole weight matrix in another order, which for a few rows takes longer than the
product; small products it computes in place, on the caller's thread. So a matrix is cut into blocks of output
rows small enough for that kernel, and the blocks are dealt to as many streams as OpenBLAS has threads. Blocks are
views, nothing is copied. Figures: docs/performance.md. On a GPU, and with another BLAS, all of this is off.

Letters: n rows, K inputs, O outputs, r outputs in a block, B blocks of a stream.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from . import BLAS, blas
from .device import on_gpu

# OpenBLAS, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c: products that are computed in place
KERNELS = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")
SMALL_OUTPUT, SMALL_PRODUCT, SMALL_INPUT = 1200, 100**3, 32  # at most n O, at most n O K, at least K

MAX_ROWS = 12  # from 16 rows on copying pays
MIN_BLOCK = 8  # outputs
SHARED_FROM = 400_000  # weights; below, waking another thread takes longer than it saves


@cache
def _streams() -> tuple[mx.ThreadLocalStream | None, ...]:
    """The streams to share products among, the caller's own (None) first; empty where products are left alone."""
    threads = blas.openblas_threads(BLAS, KERNELS)
    return (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(threads - 1))) if threads else ()


class Product:
    """x -> x @ weight.T for a weight (O, K) that does not change."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        self._inputs = weight.shape[1]
        self._most_rows = 0 if on_gpu() or weight.dtype != mx.float32 else MAX_ROWS
        self._blocks: dict[int, list[mx.array]] = {}

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., O)"""
        blocks = self.blocks(x)
        return in_blocks(x, blocks) if blocks else x @ self.weight.T

    def blocks(self, x: mx.array) -> list[mx.array]:
        """The weights cut for as many rows as x has, (B, K, r) for every stream; none where that would not pay."""
        rows = x.size // self._inputs
        if not 0 < rows <= self._most_rows:
            return []
        blocks = self._blocks.get(rows)
        if blocks is None:
            blocks = self._blocks[rows] = _cut(self.weight, rows)
        return blocks


def _cut(weight: mx.array, rows: int) -> list[mx.array]:
    outputs, inputs = weight.shape
    parts = len(_streams()) if weight.size >= SHARED_FROM else min(1, len(_streams()))
    if not parts or inputs < SMALL_INPUT or outputs % parts:
        return []
    share = outputs // parts
    block = min(share, SMALL_OUTPUT // rows, SMALL_PRODUCT // (rows * inputs))
    while block >= MIN_BLOCK and share % block:
        block -= 1
    if block < MIN_BLOCK:
        return []
    shares = [weight[i * share : (i + 1) * share] for i in range(parts)]
    blocks = [part.reshape(share // block, block, inputs).swapaxes(1, 2) for part in shares]
    mx.eval(blocks)
    return blocks


def in_blocks(x: mx.array, blocks: list[mx.array]) -> mx.array:
    """(..., K) times blocks (B, K, r) -> (..., O)."""
    rows = x.reshape(1, -1, x.shape[-1])
    shares = [mx.matmul(rows, part, stream=s) for part, s in zip(blocks, _streams(), strict=False)]
    shares = [share.swapaxes(0, 1) for share in shares]  # (B, n, r) -> (n, B, r)
    out = mx.concatenate(shares, axis=1) if len(shares) > 1 else shares[0]
    return out.reshape(*x.shape[:-1], -1)


class _Linear(nn.Linear):
    _product: Product

    def __call__(self, x: mx.array) -> mx.array:
        current = self._product.weight is self.weight  # not so once the layer was updated
        blocks = self._product.blocks(x) if current else []
        if not blocks:
            return super().__call__(x)
        out = in_blocks(x, blocks)
        return out + self.bias if "bias" in self else out


class _Embedding(nn.Embedding):
    """Tied: also the output head."""

    _product: Product

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x) if self._product.weight is self.weight else super().as_linear(x)


def share_products(module: nn.Module) -> None:
    """Have the linear layers of `module`, and its embeddings as output heads, compute few rows in this way.

    Their class is replaced by a subclass, their weights stay. A layer whose weight is replaced later goes back
    to MLX's product.
    """
    if on_gpu() or not _streams():
        return
    for child in module.modules():
        if type(child) in (nn.Linear, nn.Embedding):
            child.__class__ = _Linear if isinstance(child, nn.Linear) else _Embedding
        if isinstance(child, _Linear | _Embedding):
            child._product = Product(child.weight)
