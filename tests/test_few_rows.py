"""Products shared among streams: the same values whatever the sizes, MLX's own product where it does not apply."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from redrafter_mlx import BLAS, Sampling, blas, few_rows, generate
from tests.toy import make

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx import drafter as drafter_module
from redrafter_mlx.few_rows import MAX_ROWS, Product, tile_products


@pytest.fixture(params=[1, 2, 3])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As where OpenBLAS has so many threads and every matrix is large."""
    made = (None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(request.param - 1)))
    monkeypatch.setattr(few_rows, "_streams", lambda: made)
    monkeypatch.setattr(few_rows, "SHARED_FROM", 0)
    with mx.stream(mx.cpu):
        yield request.param


@pytest.fixture
def random() -> None:
    mx.random.seed(0)


def same(got: mx.array, wanted: mx.array) -> None:
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
def test_tiles_are_small_and_give_the_plain_product(
    streams: int, random: None, rows: int, outputs: int, inputs: int, tile: int
) -> None:
    weight, x = mx.random.normal((outputs, inputs)), mx.random.normal((1, rows, inputs))
    product = Product(weight)
    tiles = product.tiles(x)
    size = rows * tile
    assert bool(tiles) == (size <= few_rows.SMALL_OUTPUT and size * inputs <= few_rows.SMALL_PRODUCT)
    if tiles:
        assert len(tiles) == min(streams, outputs // tile)
        assert {part.shape[2] for part in tiles} == {tile}
        assert sum(part.shape[0] for part in tiles) * tile == outputs
        assert product.tiles(x) is tiles
        assert len(Product(weight, shared=False).tiles(x)) == 1
    same(Product(weight, shared=False)(x), x @ weight.T)
    same(product(x), x @ weight.T)
    same(product(x[0]), x[0] @ weight.T)
    same(product(x[0, 0]), x[0, 0] @ weight.T)


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
    product = Product(weight)
    assert product.tiles(x) == [] and bool(mx.array_equal(product(x), x @ weight.T))


def test_layers_share_until_their_weight_is_replaced(streams: int, random: None) -> None:
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48, bias=False), nn.Embedding(48, 96))
    x, weights = mx.random.normal((1, 3, 64)), layers.parameters()

    def outputs() -> list[mx.array]:
        first = layers.layers[0](x)
        return [first, layers.layers[1](first), layers.layers[2].as_linear(first)]

    plain = outputs()
    tile_products(layers)
    assert layers.layers[0]._product.tiles(x), "it applies"
    for got, wanted in zip(outputs(), plain, strict=True):
        same(got, wanted)
    assert layers.parameters() == weights, "tiles are no parameters"
    layers.layers[0].weight = layers.layers[0].weight * 2
    same(layers.layers[0](x) - layers.layers[0].bias, 2 * (plain[0] - layers.layers[0].bias))
    tile_products(layers)
    assert layers.layers[0]._product.tiles(x)[0].shape[1] == 64
    same(layers.layers[0](x) - layers.layers[0].bias, 2 * (plain[0] - layers.layers[0].bias))


def test_in_another_thread(streams: int, random: None) -> None:
    weight, x = mx.random.normal((96, 64)), mx.random.normal((2, 64))
    product, results = Product(weight), []
    mx.eval(x, product(x))

    def work() -> None:
        with mx.stream(mx.cpu):
            results.append(np.array(product(x)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_allclose(results[0], np.array(x @ weight.T), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_text_is_the_plain_one(streams: int, temperature: float) -> None:
    model = make("llama")
    sampling = Sampling(temperature=temperature, seed=3)
    plain, drafted = (
        generate(model, [5, 6, 7], max_tokens=40, sampling=sampling, draft=draft)[1].token_ids
        for draft in ("off", "2x3@4")
    )
    assert plain == drafted
    head = model.target.model.lm_head
    assert head._product.tiles(mx.zeros((4, 32)))


@pytest.mark.parametrize(("large", "shared"), [(0, True), (1 << 40, False)])
def test_only_a_large_drafters_products_are_shared(
    streams: int, monkeypatch: pytest.MonkeyPatch, large: int, shared: bool
) -> None:
    monkeypatch.setattr(drafter_module, "LARGE", large)
    drafter = make("llama", head="factored", exit_dim=96).drafter
    assert drafter is not None
    drafter.settle()
    products = [layer._product for layer in drafter.modules() if hasattr(layer, "_product")]
    assert len(products) > 2 and isinstance(drafter._rows, Product) and drafter._halves is not None
    assert {product._shared for product in (*products, *drafter._halves, drafter._rows)} == {shared}


def test_no_copies_that_crowd_the_memory(
    streams: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    need = 4 * 2 * 64 * 96
    monkeypatch.setattr(few_rows, "_memory", lambda: need / few_rows.MEMORY - 1)
    tile_products(layers)
    assert type(layers.layers[0]) is nn.Linear
    assert "second copy" in caplog.text
    monkeypatch.setattr(few_rows, "_memory", lambda: need / few_rows.MEMORY)
    tile_products(layers)
    assert type(layers.layers[0]) is not nn.Linear


def test_threads_are_asked_of_openblas_alone() -> None:
    assert blas.openblas_threads(None, few_rows.KERNELS) == 0
    assert blas.openblas_threads(BLAS, ["PDP11"]) == 0
    if BLAS and "openblas" in BLAS:
        import ctypes

        library = ctypes.CDLL(BLAS)
        library.openblas_get_corename.restype = ctypes.c_char_p
        name = library.openblas_get_corename().decode()
        assert blas.openblas_threads(BLAS, [name.upper()]) == library.openblas_get_num_threads() > 0
