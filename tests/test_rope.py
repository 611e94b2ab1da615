"""A rope with a position per row rotates every row as the model's own rope would alone."""

from __future__ import annotations

from typing import Any

import pytest

from redrafter_mlx.rope import TreeRope

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import initialize_rope

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {  # name -> (rope, whether it rotates the two halves of a vector, so that a table serves)
    "plain": (nn.RoPE(16), True),
    "scaled": (nn.RoPE(16, base=500.0, scale=0.25), True),
    "llama3": (initialize_rope(16, 10000.0, False, LLAMA3, 512), True),
    "yarn, which scales too": (initialize_rope(16, 10000.0, False, YARN, 512), True),
    "pairs side by side": (nn.RoPE(16, traditional=True), False),
    "half of the vector": (nn.RoPE(8), False),
}
POSITIONS = mx.array([7, 8, 8, 200], dtype=mx.int32)


@pytest.mark.parametrize("name", list(ROPES))
def test_every_row_is_rotated_by_its_own_position(name: str) -> None:
    inner, has_table = ROPES[name]
    rope = TreeRope(inner, {})
    x = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    with mx.stream(mx.cpu):
        got = rope(x, offset=POSITIONS)
        rows = [inner(x[:, :, i : i + 1], offset=int(p)) for i, p in enumerate(POSITIONS.tolist())]
    np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(rows, axis=2)), atol=2e-6)
    if mx.default_device() == mx.cpu:
        assert bool(rope._kind) == has_table


def test_one_position_is_the_models_own() -> None:
    rope = TreeRope(nn.RoPE(16), {})
    x = mx.random.normal((1, 3, 4, 16))
    assert mx.array_equal(rope(x, offset=5), nn.RoPE(16)(x, offset=5))
    assert mx.array_equal(rope(x, offset=mx.array(5)), nn.RoPE(16)(x, offset=5))


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has a kernel for it")
def test_layers_that_rotate_alike_share_a_rotation_and_others_do_not() -> None:
    shared: dict[bytes, Any] = {}
    bases = (100.0, 100.0, 5000.0)
    ropes = [TreeRope(nn.RoPE(16, base=base), shared) for base in bases]
    x = mx.random.normal((1, 2, 4, 16))
    for positions in (POSITIONS, POSITIONS + 3):
        for rope, base in zip(ropes, bases, strict=True):
            want = TreeRope(nn.RoPE(16, base=base), {})._by_row(x, positions)
            np.testing.assert_allclose(np.array(rope(x, offset=positions)), np.array(want), atol=2e-6)
    assert len(shared) == 2
    assert ropes[0]._kind == ropes[1]._kind != ropes[2]._kind
