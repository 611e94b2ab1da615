"""Where a drafted text parts from the plain one, and whether rounding explains it.

Both texts are the target's own choices: at every position the token with the largest score, its logit when greedy. One
row and several rows are multiplied in another order, so that the logits of the two differ by their rounding, and where
two scores are closer than that either token may win. After such a tie the texts go different ways. A difference that
starts anywhere else is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from redrafter_mlx.sampling import Sampler, Sampling
from redrafter_mlx.target import Target

ROUNDING = 2.0**-16
"""Scores closer than this share of the largest logit are a tie in float32. SmolLM2-135M's logits of one row and of a
hundred rows differ by 3e-6 of the largest at most, and a tie has room for five times that.
"""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which two texts differ."""

    index: int
    """Position in the generated text, from 0."""
    tokens: tuple[int | None, int | None]
    """The plain text's token and the drafted text's there; None past the end of a text."""
    best: tuple[int, int]
    """The target's two best tokens there, best first."""
    scores: tuple[float, float]
    """Their scores: the logits when greedy, else filtered logits / temperature + noise."""
    bound: float
    """Scores closer than this are a tie in float32."""

    @property
    def is_tie(self) -> bool:
        """True where the texts took one each of two tokens that the rounding of float32 may put in either order."""
        return set(self.tokens) == set(self.best) and self.scores[0] - self.scores[1] <= self.bound

    def __str__(self) -> str:
        (first, second), (high, low) = self.best, self.scores
        return (
            f"token {self.index} is {self.tokens[0]} plainly and {self.tokens[1]} drafted; the target's best there are "
            f"{first} with {high:.7g} and {second} with {low:.7g}"
        )


def divergence(
    target: Target, sampling: Sampling, prompt: Sequence[int], plain: Sequence[int], drafted: Sequence[int]
) -> Divergence | None:
    """Compare two texts of one prompt; None where they are equal.

    The scores come from one forward over the text before the difference.

    Args:
        sampling: what both texts were generated with, its seed included.
        prompt: token ids, at least one.
        plain, drafted: token ids of the generated texts.
    """
    if list(plain) == list(drafted):
        return None
    shorter = min(len(plain), len(drafted))
    index = next((i for i in range(shorter) if plain[i] != drafted[i]), shorter)
    before = [*prompt, *plain[:index]]
    logits = target.model(mx.array([before]))[0, -1:].astype(mx.float32)
    sampler = Sampler(sampling, target.vocab_size, prompt)
    if index:
        sampler.commit(mx.array(list(plain[:index])))
    noise = sampler.noise(mx.array([len(before)], dtype=mx.int32), len(before), 1)
    scores = np.array(sampler.scores(logits, noise)[0])
    second, first = (int(token) for token in np.argsort(scores)[-2:])
    bound = ROUNDING * float(np.abs(np.array(logits)).max())
    return Divergence(
        index,
        (plain[index] if index < len(plain) else None, drafted[index] if index < len(drafted) else None),
        (first, second),
        (float(scores[first]), float(scores[second])),
        bound if sampling.is_greedy else bound / sampling.temperature,
    )
