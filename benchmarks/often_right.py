"""A drafter without weights that knows the text and is right with a given probability, so that paths branch.

Letters: W beam width, L beam length counting the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.interface import Seen, TargetView
from redrafter_mlx.tree import Beam, Candidates

REACH = 16  # tokens past the end of the known text


class OftenRight:
    """Offers the plain text, each token of it wrong with a probability, among wrong tokens in other branches.

    Args:
        share: of right tokens.
    """

    config = None
    source = "scripted"
    needs_text = False
    needs_rows = False
    max_width = 16
    max_length = None
    nbytes = 0

    def __init__(self, vocab: int, share: float = 0.6) -> None:
        self._vocab, self._share = vocab, share
        self.follow([0], 0)

    def follow(self, truth: Sequence[int], seed: int) -> None:
        """The plain text, prompt and answer, by absolute position."""
        self._truth = mx.array([*truth, *[0] * REACH], dtype=mx.int32)
        self._rng = np.random.default_rng(seed)

    def attach(self, target: TargetView) -> None:
        """Nothing of the target is needed."""

    def start(self, tokens: Sequence[int]) -> OftenRight:
        return self

    def keep(self, tokens: Sequence[int]) -> None:
        """Nothing is learned."""

    def parameters(self) -> dict[str, Any]:
        return {}

    def cost_key(self) -> dict[str, Any]:
        return {"kind": self.source}

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        """W candidates a level; in a slot by chance the right one, if it is not wrong, after the right one above."""
        width, height, rng = beam.width, beam.length - 1, self._rng
        level = np.arange(width * height) // width
        slots = rng.integers(0, width, height)
        parents = np.where(level == 0, -1, (level - 1) * width + rng.integers(0, width, level.size))
        is_right = np.zeros(level.size, dtype=bool)
        for depth, slot in enumerate(slots):
            is_right[depth * width + slot] = rng.random() < self._share
            if depth:
                parents[depth * width + slot] = (depth - 1) * width + slots[depth - 1]
        position = mx.array(0) if seen.position is None else seen.position
        truth = self._truth[mx.minimum(position + 1 + mx.array(level), self._truth.shape[0] - 1)]
        wrong = (truth + mx.array(rng.integers(1, self._vocab, level.size))) % self._vocab
        tokens = mx.where(mx.array(is_right), truth, wrong).astype(mx.int32)
        logprobs = -0.1 * level - 0.02 * rng.random(level.size) - 0.01
        return Candidates(
            tokens,
            mx.array(parents.astype(np.int32)),
            mx.array(logprobs.astype(np.float32)),
            height,
            width == 1,
        )
