"""A rope with a position per row rotates every row as the model's own rope would alone."""

from __future__ import annotations

from typing import Any

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.target.rope import TreeRope
from tests.toy import ROPES, make_model, make_target

POSITIONS = mx.array([7, 8, 8, 200], dtype=mx.int32)


@pytest.mark.parametrize("name", list(ROPES))
def test_every_row_is_rotated_by_its_own_position(name: str) -> None:
    inner = ROPES[name].make()
    x = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    got = TreeRope(inner, None)(x, offset=POSITIONS)
    rows = [inner(x[:, :, i : i + 1], offset=int(p)) for i, p in enumerate(POSITIONS.tolist())]
    np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(rows, axis=2)), atol=2e-6)


@pytest.mark.parametrize("offset", [5, mx.array(5)])
def test_one_position_is_the_models_own(offset: int | mx.array) -> None:
    x = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    assert mx.array_equal(TreeRope(nn.RoPE(16), None)(x, offset=offset), nn.RoPE(16)(x, offset=5))


class Table:
    """Rotations that note what they are asked for."""

    def __init__(self, answer: mx.array | None) -> None:
        self.answer = answer
        self.asked = 0

    def rotate(self, rope: Any, x: mx.array, positions: mx.array) -> mx.array | None:
        self.asked += 1
        return self.answer


def test_a_table_is_asked_first() -> None:
    x = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    found, missing = Table(mx.zeros_like(x)), Table(None)
    assert mx.array_equal(TreeRope(nn.RoPE(16), found)(x, offset=POSITIONS), mx.zeros_like(x))
    want = TreeRope(nn.RoPE(16), None)(x, offset=POSITIONS)
    assert mx.array_equal(TreeRope(nn.RoPE(16), missing)(x, offset=POSITIONS), want)
    assert (found.asked, missing.asked) == (1, 1)
    TreeRope(nn.RoPE(16), found)(x, offset=5)
    assert found.asked == 1, "the model's own rope takes one position"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_targets_ropes_share_one_table(family: str) -> None:
    target = make_target(family)
    ropes = [layer.self_attn.rope for layer in target.model.layers]
    assert all(isinstance(rope, TreeRope) and not isinstance(rope.inner, TreeRope) for rope in ropes)
    assert len({id(rope._rotations) for rope in ropes}) == 1
    assert not any(isinstance(module, TreeRope) for module in make_model(family).modules())
