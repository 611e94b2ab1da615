"""Tiled weights: the same values whatever the sizes and the streams, MLX's own product where they do not apply."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest

from redrafter_mlx.cpu import blas, tiles
from tests.toy import make

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx import Sampling, generate
from redrafter_mlx.cpu.tiles import MAX_ROWS, TiledWeight, tile_layers
from redrafter_mlx.device import PRETEND_GPU
from redrafter_mlx.drafters import beam, recurrent
from redrafter_mlx.kernels import SWITCH


@pytest.fixture(params=[1, 2, 3])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As where OpenBLAS has so many threads and every matrix is large."""
    made = (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(request.param - 1)))
    monkeypatch.setattr(tiles, "_streams", lambda: made)
    monkeypatch.setattr(tiles, "SHARED_FROM", 0)
    for name in (SWITCH, PRETEND_GPU):
        monkeypatch.delenv(name, raising=False)
    with mx.stream(mx.cpu):
        yield request.param


@pytest.fixture
def random() -> None:
    mx.random.seed(0)


def assert_same(got: mx.array, wanted: mx.array) -> None:
    assert got.shape == wanted.shape
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 5, 12, MAX_ROWS])
@pytest.mark.parametrize(
    ("outputs", "inputs", "tile"),
    [
        (192, 64, 64),
        (96, 64, 32),
        (6144, 40, 64),
        (640, 1536, 32),
        (608, 600, 32),
        (80, 2048, 16),
        (48, 9000, 16),
    ],
)
def test_tiles_are_small_and_give_the_plain_values(
    streams: int, random: None, rows: int, outputs: int, inputs: int, tile: int
) -> None:
    weight, x = mx.random.normal((outputs, inputs)), mx.random.normal((1, rows, inputs))
    tiled = TiledWeight(weight)
    parts = tiled.tiles(x)
    size = rows * tile
    assert bool(parts) == (size <= tiles.SMALL_OUTPUT and size * inputs <= tiles.SMALL_PRODUCT)
    if parts:
        assert len(parts) == min(streams, outputs // tile)
        assert {part.shape[2] for part in parts} == {tile}
        assert sum(part.shape[0] for part in parts) * tile == outputs
        assert tiled.tiles(x) is parts, "they are cut once"
        assert len(TiledWeight(weight, num_cores=1).tiles(x)) == 1
    assert_same(TiledWeight(weight, num_cores=1)(x), x @ weight.T)
    assert_same(tiled(x), x @ weight.T)
    assert_same(tiled(x[0]), x[0] @ weight.T)
    assert_same(tiled(x[0, 0]), x[0, 0] @ weight.T)
    assert tiled.dense() is weight and tiled.nbytes == weight.nbytes


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "dtype"),
    [
        (MAX_ROWS + 1, 96, 64, mx.float32),  # copying pays
        (0, 96, 64, mx.float32),
        (2, 96, 24, mx.float32),  # too few inputs for the small kernel
        (2, 200, 64, mx.float32),  # no tile divides the outputs
        (2, 96, 64, mx.float16),
    ],
)
def test_left_alone(
    streams: int, random: None, rows: int, outputs: int, inputs: int, dtype: mx.Dtype
) -> None:
    weight, x = mx.random.normal((outputs, inputs)).astype(dtype), mx.ones((rows, inputs), dtype)
    tiled = TiledWeight(weight)
    assert tiled.tiles(x) == [] and bool(mx.array_equal(tiled(x), x @ weight.T))


def test_layers_are_tiled_until_their_weight_is_replaced(streams: int, random: None) -> None:
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48, bias=False), nn.Embedding(48, 96))
    x, weights = mx.random.normal((1, 3, 64)), layers.parameters()

    def outputs() -> list[mx.array]:
        first = layers.layers[0](x)
        return [first, layers.layers[1](first), layers.layers[2].as_linear(first)]

    plain = outputs()
    tile_layers(layers)
    assert layers.layers[0]._tiled.tiles(x), "it applies"
    for got, wanted in zip(outputs(), plain, strict=True):
        assert_same(got, wanted)
    assert layers.parameters() == weights, "tiles are no parameters"
    layers.layers[0].weight = layers.layers[0].weight * 2
    assert_same(layers.layers[0](x) - layers.layers[0].bias, 2 * (plain[0] - layers.layers[0].bias))
    tile_layers(layers)
    assert layers.layers[0]._tiled.tiles(x)[0].shape[1] == 64
    assert_same(layers.layers[0](x) - layers.layers[0].bias, 2 * (plain[0] - layers.layers[0].bias))


def test_in_another_thread(streams: int, random: None) -> None:
    weight, x = mx.random.normal((96, 64)), mx.random.normal((2, 64))
    tiled, results = TiledWeight(weight), []
    mx.eval(x, tiled(x))

    def work() -> None:
        with mx.stream(mx.cpu):
            results.append(np.array(tiled(x)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_allclose(results[0], np.array(x @ weight.T), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_text_is_the_plain_one(streams: int, temperature: float) -> None:
    model = make("llama")
    assert model.drafter is not None
    model.drafter.eval()  # type: ignore[attr-defined]
    model.drafter.attach(model.target)
    sampling = Sampling(temperature=temperature, seed=3)
    plain, drafted = (
        generate(model, [5, 6, 7], max_tokens=40, sampling=sampling, draft=draft)[1].token_ids
        for draft in ("off", "2x3@4")
    )
    assert plain == drafted
    assert model.target.model.lm_head._tiled.tiles(mx.zeros((4, 32)))
    assert model.drafter.lm_head[-1]._tiled.tiles(mx.zeros((2, 64)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_large", [True, False])
def test_only_a_large_drafter_takes_every_core(
    streams: int, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    monkeypatch.setattr(beam, "LARGE", 0 if is_large else 1 << 40)
    drafter = make("llama", head="factored", exit_dim=96).drafter
    assert isinstance(drafter, recurrent.RecurrentDrafter)
    drafter.eval()
    assert drafter._target is not None
    drafter.attach(drafter._target)
    weights = [layer._tiled for layer in drafter.modules() if hasattr(layer, "_tiled")]
    assert len(weights) > 2 and isinstance(drafter._rows, TiledWeight) and drafter._parts is not None
    made = {each._parts for each in (*weights, *drafter._parts, drafter._rows)}
    assert made == {streams if is_large else 1}


def test_copies_do_not_crowd_the_memory(
    streams: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    need = 4 * 2 * 64 * 96
    monkeypatch.setattr(tiles, "memory_bytes", lambda: need / tiles.MEMORY_SHARE - 1)
    tile_layers(layers)
    assert type(layers.layers[0]) is nn.Linear
    assert "second copy" in caplog.text
    monkeypatch.setattr(tiles, "memory_bytes", lambda: need / tiles.MEMORY_SHARE)
    tile_layers(layers)
    assert type(layers.layers[0]) is not nn.Linear


def test_with_another_blas_nothing_is_tiled_which_the_log_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiles, "_streams", tuple)
    caplog.set_level("INFO", "redrafter_mlx")
    layers, x = nn.Sequential(nn.Linear(64, 96)), mx.ones((1, 64))
    tile_layers(layers)
    assert type(layers.layers[0]) is nn.Linear
    assert TiledWeight(layers.layers[0].weight).tiles(x) == []
    assert "needs OpenBLAS" in caplog.text


def test_threads_are_asked_of_openblas_alone() -> None:
    path = blas.loaded()
    assert blas.openblas_threads(None, tiles.KERNELS) == 0
    assert blas.openblas_threads(path, ["PDP11"]) == 0
    if path and "openblas" in path:
        library = ctypes.CDLL(path)
        library.openblas_get_corename.restype = ctypes.c_char_p
        name = library.openblas_get_corename().decode()
        assert blas.openblas_threads(path, [name.upper()]) == library.openblas_get_num_threads() > 0
