"""Penalties: every node of a tree with its own history."""

from __future__ import annotations

import redrafter_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.sampling import Sampling
from redrafter_mlx.sampling.penalties import penalized
from redrafter_mlx.tree import TokenTree


def test_penalties_use_each_nodes_own_history() -> None:
    logits = mx.array([[2.0, -2.0, 1.0, 1.0]] * 3)
    mask = mx.array([[True, False, False], [True, True, False], [True, False, True]])
    parents, depth = mx.array([0, 0, 0]), mx.array([0, 1, 1])
    tree = TokenTree(mx.array([1, 2, 3]), parents, depth, mask, 1)  # root 1, branches 2 and 3
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    bias = mx.array([0.0, 0.0, 0.0, 10.0])
    got = penalized(logits, sampling, mx.array([1.0, 0, 0, 0]), mx.zeros((4,)), tree, bias)
    # token 0 was in the prompt only: repetition alone; token 1 is in all histories
    want = [
        [1.0, -4.75, 1.0, 11.0],
        [1.0, -4.75, 0.5 - 0.75, 11.0],
        [1.0, -4.75, 1.0, 5.5 - 0.75],
    ]
    np.testing.assert_allclose(got, want, atol=1e-6)
