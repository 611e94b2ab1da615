"""Rotations that are looked up are those of the model's own rope, shared by the layers that rotate alike."""

from __future__ import annotations

import pytest

from redrafter_mlx.cpu.rope_table import RotationTable

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.target.rope import TreeRope
from tests.toy import ROPES

POSITIONS = mx.array([7, 8, 8, 200], dtype=mx.int32)


@pytest.mark.parametrize("name", list(ROPES))
def test_every_row_is_rotated_by_its_own_position(name: str) -> None:
    inner, table = ROPES[name].make(), RotationTable()
    rope = TreeRope(inner, table)
    x = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    with mx.stream(mx.cpu):
        found = table.rotate(rope, x, POSITIONS)
        got = rope(x, offset=POSITIONS)
        rows = [inner(x[:, :, i : i + 1], offset=int(p)) for i, p in enumerate(POSITIONS.tolist())]
    assert (found is not None) == bool(rope.kind) == ROPES[name].rotates_halves
    np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(rows, axis=2)), atol=2e-6)


def test_layers_that_rotate_alike_share_a_rotation_and_others_do_not() -> None:
    table = RotationTable()
    bases = (100.0, 100.0, 5000.0)
    ropes = [TreeRope(nn.RoPE(16, base=base), table) for base in bases]
    x = mx.random.normal((1, 2, 4, 16), key=mx.random.key(0))
    with mx.stream(mx.cpu):
        for positions in (POSITIONS, POSITIONS + 3):
            for rope, base in zip(ropes, bases, strict=True):
                want = TreeRope(nn.RoPE(16, base=base), None)(x, offset=positions)
                np.testing.assert_allclose(np.array(rope(x, offset=positions)), np.array(want), atol=2e-6)
    assert len(table._rotations) == 2
    assert ropes[0].kind == ropes[1].kind != ropes[2].kind


def test_a_rotation_is_computed_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    table = RotationTable()
    ropes = [TreeRope(nn.RoPE(16), table) for _ in range(3)]
    x = mx.random.normal((1, 2, 4, 16), key=mx.random.key(0))
    for rope in ropes:
        rope(x, offset=POSITIONS)  # each finds out what kind it is
    calls: list[int] = []
    by_row = TreeRope.by_row
    monkeypatch.setattr(TreeRope, "by_row", lambda self, *given: calls.append(1) or by_row(self, *given))
    positions = POSITIONS + 1
    for rope in ropes:
        rope(x, offset=positions)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bits_are_the_models_own(dtype: mx.Dtype) -> None:
    """A table of float32 would round otherwise."""
    rope = TreeRope(nn.RoPE(16), RotationTable())
    x = mx.random.normal((1, 2, 4, 16), key=mx.random.key(0)).astype(dtype)
    got = rope(x, offset=POSITIONS)
    assert got.dtype == dtype
    assert mx.array_equal(got, TreeRope(nn.RoPE(16), None)(x, offset=POSITIONS))


def test_an_odd_size_is_the_models_own() -> None:
    class Shift(nn.Module):
        def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
            return x + offset.reshape(-1, 1, 1, 1)

    rope = TreeRope(Shift(), RotationTable())
    got = rope(mx.zeros((1, 2, 4, 5)), offset=POSITIONS)
    assert rope.kind == b"" and got[0, 1, :, 2].tolist() == POSITIONS.tolist()
