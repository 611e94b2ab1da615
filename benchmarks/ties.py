"""Whether two texts part where rounding may decide: at two scores that are almost equal."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.sampling import Sampler, Sampling

TIE = 2e-4
"""Scores closer than this, in the spread of all, may be rounded to either order."""


def first_difference(mine: Sequence[int], want: Sequence[int]) -> int | None:
    """Index of the first token that differs; None where the texts are equal."""
    if list(mine) == list(want):
        return None
    pairs = enumerate(zip(mine, want, strict=False))
    return next((index for index, pair in pairs if pair[0] != pair[1]), min(len(mine), len(want)))


def gap(model: nn.Module, text: Sequence[int], sampling: Sampling, vocab: int) -> float:
    """Distance of the two best scores of the token after `text`, in the spread of all, as mlx-lm's `model` has them."""
    sampler, position = Sampler(sampling, vocab, text), len(text)
    logits = model(mx.array([list(text)]))[0, -1:]
    noise = sampler.noise(mx.array([position], dtype=mx.int32), position, 1)
    scores = np.array(sampler.scores(logits, noise)[0].astype(mx.float32))
    best = np.sort(scores[np.isfinite(scores)])
    return float((best[-1] - best[-2]) / best.std())
