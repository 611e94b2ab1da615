"""What acceptance to expect from so much text: a curve measured with the default model, kept in `assets`."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from redrafter_mlx.files import read_json

CURVE = Path(__file__).parent.parent / "assets" / "training_curve.json"

PAYS_FROM = 1.25
"""Held-out tokens per step, one beam of 5, below which a drafter hardly ever speeds a model up: a step with a draft
costs a fifth to a third more than one without (docs/notes/drafter-runs.md, docs/performance.md)."""


@cache
def _points() -> list[tuple[float, float]]:
    """Positions and tokens per step, by rising positions."""
    return sorted((p["positions"], p["tokens_per_step"]) for p in read_json(CURVE)["points"])


def expected_tokens_per_step(positions: float) -> float:
    """Held-out tokens per step to expect from so many positions of text.

    Straight between measured points over the logarithm of the positions; below the first one the gain over 1 falls in
    proportion to the text, above the last one it stays what it was there, because more was never tried.
    """
    points = _points()
    first, gain = points[0]
    if positions <= first:
        return 1 + (gain - 1) * max(0.0, positions) / first
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if positions <= right:
            return low + (high - low) * math.log(positions / left) / math.log(right / left)
    return points[-1][1]


def positions_for(tokens_per_step: float) -> int:
    """The least positions of text from which to expect so much, to two digits upwards."""
    low, high = 1.0, _points()[-1][0]
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected_tokens_per_step(middle) < tokens_per_step else (low, middle)
    digit = 10 ** max(0, math.floor(math.log10(high)) - 1)
    return int(math.ceil(high / digit) * digit)
