"""One temperature per depth that calibrates a drafter's probabilities.

`auto` and the choice of nodes take path probabilities at face value. A drafter is trained on all positions of a text,
with soft targets, and its probabilities are too high or too low. Dividing the logits of a depth by one number, fitted
to the likelihood of held-out text, corrects that (Guo et al., 1706.04599).
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.kernels import exponential
from redrafter_mlx.target import Target

from .loss import Batch, depth_features

TEMPERATURES = np.geomspace(0.5, 2.5, 25)


def calibrate(
    drafter: RecurrentDrafter, target: Target, rows: mx.array, batches: Iterable[Batch], depths: int
) -> tuple[float, ...]:
    """The temperature of maximum likelihood for each depth; 1 for a depth without data.

    Args:
        rows: (V, H) of the target's output embedding for the drafter's vocabulary.
        batches: held-out text. Tokens outside the drafter's vocabulary do not count.
    """
    draft_id = np.array(drafter.draft_ids())
    matrix = rows if drafter.config.head == "factored" else drafter.lm_head[-1].weight
    loss, counted = np.zeros((depths, len(TEMPERATURES))), np.zeros(depths)
    for batch in batches:
        size = batch.left.shape[1]
        for depth, features in enumerate(depth_features(drafter, batch, target.embed, depths)):
            truth = draft_id[np.array(batch.tokens[:, 1 + depth : 1 + depth + size])]
            index = np.flatnonzero(((np.array(batch.left) > depth) & (truth >= 0)).reshape(-1))
            if not len(index):
                continue
            logits = features.reshape(-1, features.shape[-1])[mx.array(index)] @ matrix.T
            own = mx.take_along_axis(logits, mx.array(truth.reshape(-1)[index])[:, None], axis=1)
            top = logits.max(axis=1, keepdims=True)
            below, missed, ones = logits - top, top - own, mx.ones((logits.shape[1], 1))
            for column, temperature in enumerate(TEMPERATURES.tolist()):
                total = exponential(below / temperature) @ ones  # a matrix product sums faster on the CPU
                loss[depth, column] += float((mx.log(total) + missed / temperature).sum())
            counted[depth] += len(index)
    best = TEMPERATURES[loss.argmin(axis=1)]
    return tuple(round(float(t), 3) if n else 1.0 for t, n in zip(best, counted, strict=True))
