"""Candidates for tests: the worked example, random ones, and what they say as paths."""

from __future__ import annotations

from collections.abc import Sequence

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.tree import NEVER, Candidates


def offer(tokens: Sequence[int], parents: Sequence[int], logprobs: Sequence[float]) -> Candidates:
    """Candidates from lists."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return Candidates(
        mx.array(tokens, dtype=mx.int32), mx.array(parents, dtype=mx.int32), mx.array(logprobs), max(depths)
    )


# "Mars is a red / Mars is reddish when / Mars is dark red" (docs/algorithm.md); three slots a level, of which the
# first level's other two lead nowhere
MARS, IS, A, REDDISH, DARK, RED, WHEN = range(10, 17)
MARS_OFFER = offer(
    [IS, 99, 98, A, REDDISH, DARK, RED, WHEN, RED],
    [-1, -1, -1, 0, 0, 0, 3, 4, 5],
    [-0.1, NEVER, NEVER, -1.0, -1.2, -1.4, -1.3, -1.6, -2.0],
)


def random_offer(rng: np.random.Generator, width: int, length: int, vocab: int = 12) -> Candidates:
    """What a beam search over random log-probabilities offers, computed the slow way."""
    tokens: list[int] = []
    parents: list[int] = []
    logprobs: list[float] = []
    level = {-1: 0.0}
    for _ in range(length - 1):
        grown = []
        for parent, total in level.items():
            scores = np.log(rng.dirichlet(np.full(vocab, 0.3)) + 1e-9)
            grown += [(float(total + score), parent, token) for token, score in enumerate(scores)]
        grown = sorted(grown, reverse=True)[:width]
        level = {len(tokens) + index: each[0] for index, each in enumerate(grown)}
        tokens += [each[2] for each in grown]
        parents += [each[1] for each in grown]
        logprobs += [each[0] for each in grown]
    return offer(tokens, parents, logprobs)


def all_paths(candidates: Candidates) -> dict[tuple[int, ...], float]:
    """Every path of tokens below the root that is offered -> its log-probability."""
    tokens, parents = np.array(candidates.tokens).tolist(), np.array(candidates.parents).tolist()
    paths: list[tuple[int, ...]] = []
    out: dict[tuple[int, ...], float] = {}
    for token, parent, logprob in zip(tokens, parents, np.array(candidates.logprobs).tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
        if logprob > NEVER / 2:
            out[paths[-1]] = logprob
    return out
