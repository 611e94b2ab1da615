"""The largest entries of a vocabulary-sized vector without sorting it.

On Metal `mx.topk` and `mx.argpartition` sort the whole vector (in mlx/backend/metal/sort.cpp, partition calls sort).
"""

from __future__ import annotations

import math

import mlx.core as mx


def top_k(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest entries of x (V,), largest first, and their int32 indices.

    x is cut into chunks. The k largest entries lie in the k chunks with the largest maxima, so that only the maxima and
    those chunks are sorted.
    """
    size = x.shape[0]
    if k == 1:
        index = mx.argmax(x, keepdims=True)
        return x[index], index.astype(mx.int32)
    chunk = max(1, math.isqrt(size // k))
    num_chunks = size // chunk
    if num_chunks <= k:
        order = mx.argsort(-x)[:k]
        return x[order], order.astype(mx.int32)
    rest = size - num_chunks * chunk
    body = x[: size - rest].reshape(num_chunks, chunk)
    best = mx.argsort(-body.max(axis=1))[:k]  # (k,) chunks
    index = (best[:, None] * chunk + mx.arange(chunk, dtype=best.dtype)).reshape(-1)
    if rest:  # the short last chunk always takes part
        index = mx.concatenate([index, mx.arange(size - rest, size, dtype=index.dtype)])
    candidates = x[index]
    order = mx.argsort(-candidates)[:k]
    return candidates[order], index[order].astype(mx.int32)
