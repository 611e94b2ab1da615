"""The noise is a function of seed and position, however it is asked for."""

from __future__ import annotations

import redrafter_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx

from redrafter_mlx.sampling.noise import PositionNoise, gumbel


def test_noise_is_a_function_of_seed_and_position() -> None:
    block = gumbel(9, mx.array([4, 5, 6], dtype=mx.int32), 100)
    assert mx.array_equal(block[1:2], gumbel(9, mx.array([5], dtype=mx.int32), 100))
    assert not mx.array_equal(block[1:2], gumbel(10, mx.array([5], dtype=mx.int32), 100))
    assert not mx.array_equal(block[0], block[1])


def test_noise_buffer_gives_every_position_its_own_row() -> None:
    """Whatever was asked before, a row is the one its seed and position make."""
    buffer = PositionNoise(9, 50)
    for low, positions in ((4, [4]), (5, [6, 7, 5]), (7, [20, 8]), (30, [31]), (31, [31, 33])):
        got = buffer.at(mx.array(positions, dtype=mx.int32), low, max(positions) + 1)
        assert mx.array_equal(got, gumbel(9, mx.array(positions, dtype=mx.int32), 50))


def test_all_bits_of_a_seed_count() -> None:
    position = mx.arange(3, dtype=mx.int32)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    rows = [tuple(gumbel(seed, position, 8).reshape(-1).tolist()) for seed in seeds]
    assert len(set(rows)) == len(seeds)
