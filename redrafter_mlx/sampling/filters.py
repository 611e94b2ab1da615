"""top-p, min-p and top-k: which tokens may be drawn.

They are mlx-lm's, in its order, on the distribution before the temperature: top-p, min-p, top-k. No filter sorts the
vocabulary: a threshold is found by bisecting the bits of a float, in 30 passes of compare and sum, which every device
does fast.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import mlx.core as mx

from redrafter_mlx.device import fused

from .settings import Sampling


def filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """(N, V) float32 with -inf where a filter drops the token."""
    if sampling.top_p < 1:
        mass = max(sampling.top_p, 1e-9)  # some mass, so that 0 keeps the most probable token
        logits = mx.where(_top_p(mx.softmax(logits, axis=-1), mass), logits, -mx.inf)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = mx.where(logits >= floor, logits, -mx.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = mx.where(_top_k(logits, sampling.top_k), logits, -mx.inf)
    return logits


@fused
def _top_p(probs: mx.array, top_p: float) -> mx.array:
    """Keep tokens in order of falling probability until their mass reaches top_p; of equal ones all or none."""

    def enough(threshold: mx.array) -> mx.array:
        return mx.where(probs >= threshold, probs, 0).sum(axis=-1, keepdims=True) >= top_p

    return probs >= _bisect(enough, probs.shape[0])


@fused
def _top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k largest, and all that equal the smallest of them."""
    # exp(x - max) is positive, so its bits order as its value does; what underflows to 0 ties with -inf.
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))

    def enough(threshold: mx.array) -> mx.array:
        return (weights >= threshold).sum(axis=-1, keepdims=True) >= k

    return weights >= _bisect(enough, logits.shape[0])


def _bisect(enough, num_rows: int) -> mx.array:  # type: ignore[no-untyped-def]
    """(N, 1): per row the largest float in [0, 2) for which `enough` holds; it must hold at 0.

    Positive floats order as their bit patterns, so 30 bits are decided one by one from the top.
    """
    bits = mx.zeros((num_rows, 1), dtype=mx.uint32)
    for bit in range(29, -1, -1):
        candidate = bits | mx.array(1 << bit, dtype=mx.uint32)
        bits = mx.where(enough(candidate.view(mx.float32)), candidate, bits)
    return bits.view(mx.float32)
