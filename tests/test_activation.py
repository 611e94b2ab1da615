import pytest

from tests.toy import make_model

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations, base, llama

from redrafter_mlx import activation
from redrafter_mlx.activation import attention, exponential, replace_exponentials, silu, swiglu

X = mx.array([-2000.0, -200.0, -90.0, -5.0, -0.1, 0.0, 0.1, 3.0, 80.0, 2000.0])


def test_silu_and_its_gradient_are_mlxs_own() -> None:
    np.testing.assert_allclose(np.array(silu(X)), np.array(nn.silu(X)), atol=1e-6)
    ours = mx.grad(lambda x: (silu(x) ** 2).sum())(X)
    theirs = mx.grad(lambda x: (x * mx.sigmoid(x)).square().sum())(X)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-6)


def test_exponential() -> None:
    np.testing.assert_allclose(np.array(exponential(X[3:8])), np.exp(np.array(X[3:8])), rtol=1e-5)
    assert exponential(X[0]).item() == 0


@pytest.mark.parametrize("size", [10, 8000])
def test_swiglu_is_mlx_lms_own(size: int) -> None:
    gate = mx.tile(X, size // X.size)
    x = mx.arange(gate.size) % 7 - 3.0
    np.testing.assert_allclose(
        np.array(swiglu(gate, x)), np.array(activations.swiglu(gate, x)), rtol=1e-5, atol=1e-6
    )
    half, other = (a.astype(mx.float16) for a in (mx.clip(gate, -9, 9), x))
    assert mx.array_equal(swiglu(half, other), activations.swiglu(half, other))


def _inputs(rows: int, positions: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    """Queries of 6 heads, keys and values of 2; some keys are far longer than others."""
    keys = mx.random.split(mx.random.key(rows), 3)
    queries = 3 * mx.random.normal((2, 6, rows, 16), key=keys[0])
    return (
        queries.astype(dtype),
        (9 * mx.random.normal((2, 2, positions, 16), key=keys[1])).astype(dtype),
        mx.random.normal((2, 2, positions, 24), key=keys[2]).astype(dtype),
    )


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("mask", [None, "causal", "tree"])
def test_attention_is_mlxs_own(rows: int, mask: str | None) -> None:
    positions = 400 if rows < 40 else 64
    inputs = _inputs(rows, positions)
    own: mx.array | str | None = mask
    if mask == "tree":
        own = mx.random.uniform(shape=(rows, positions), key=mx.random.key(1)) < 0.3
        own[:, -1] = True
    with mx.stream(mx.cpu):
        got = attention(*inputs, cache=None, scale=0.25, mask=own)
        want = mx.fast.scaled_dot_product_attention(*inputs, scale=0.25, mask=own)
    assert got.shape == (2, 6, rows, 24)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=2e-5)


def test_attention_leaves_the_rest_to_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit, few values, sinks, masks that add, quantised keys and values."""
    calls = []
    monkeypatch.setattr(activation, "_their_attention", lambda *given: calls.append(given) or mx.array(0))
    many, few = _inputs(8, 400), _inputs(1, 20)
    quantised = (many[0], *((a, a, a) for a in many[1:]))
    half = _inputs(8, 400, mx.float16)
    for inputs, mask, sinks in (
        (half, None, None),
        (few, None, None),
        (many, None, mx.zeros((6,))),
        (many, mx.zeros((8, 400)), None),
        (quantised, None, None),
    ):
        attention(*inputs, None, 0.25, mask, sinks)  # type: ignore[call-arg]
    assert len(calls) == 5
    attention(*many, None, 0.25, None)
    assert len(calls) == 5


def test_models_of_an_architecture_take_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    monkeypatch.setattr(llama, "scaled_dot_product_attention", base.scaled_dot_product_attention)
    model = make_model("llama")
    with mx.stream(mx.cpu):
        replace_exponentials(model)
    assert llama.swiglu is swiglu and llama.scaled_dot_product_attention is attention
    monkeypatch.setattr(llama, "swiglu", own := lambda gate, x: gate + x)
    replace_exponentials(model)
    assert llama.swiglu is own, "only mlx-lm's own is replaced"
