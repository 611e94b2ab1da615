"""SwiGLU and attention of a CPU: the values of mlx-lm's, for the models of a target and for no others."""

from __future__ import annotations

from types import FunctionType

import pytest

from tests.toy import make_model, make_target

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations, base, llama

from redrafter_mlx.cpu import attention as module
from redrafter_mlx.cpu.attention import attention, replace_functions, swiglu
from redrafter_mlx.device import on_gpu
from redrafter_mlx.kernels import SWITCH

X = mx.array([-2000.0, -200.0, -90.0, -5.0, -0.1, 0.0, 0.1, 3.0, 80.0, 2000.0])
LONG = (mx.arange(120, dtype=mx.int32) * 7 % 61)[None]
"""Tokens (1, 120) of a text long enough for the faster forms to be taken."""


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
    """16-bit, few values, sinks, masks that add, quantized keys and values."""
    calls = []
    monkeypatch.setattr(module, "_their_attention", lambda *given: calls.append(given) or mx.array(0))
    many, few = _inputs(8, 400), _inputs(1, 20)
    quantized = (many[0], *((a, a, a) for a in many[1:]))
    half = _inputs(8, 400, mx.float16)
    for inputs, mask, sinks in (
        (half, None, None),
        (few, None, None),
        (many, None, mx.zeros((6,))),
        (many, mx.zeros((8, 400)), None),
        (quantized, None, None),
    ):
        attention(*inputs, None, 0.25, mask, sinks)  # type: ignore[call-arg]
    assert len(calls) == 5
    attention(*many, None, 0.25, None)
    assert len(calls) == 5


def _function_of(layer: nn.Module, name: str) -> object:
    """What `name` stands for in the code that runs when `layer` is called."""
    method = type(layer).__call__
    assert isinstance(method, FunctionType)
    return method.__globals__[name]


def test_a_models_own_modules_take_them() -> None:
    model = make_model("llama", num_hidden_layers=2)
    with mx.stream(mx.cpu):
        want = model(LONG)
        parameters = model.parameters()
        replace_functions(model)
        for layer in model.layers:
            assert _function_of(layer.mlp, "swiglu") is swiglu
            assert _function_of(layer.self_attn, "scaled_dot_product_attention") is attention
        assert type(model.layers[0].mlp) is type(model.layers[1].mlp), "one subclass for every class"
        assert isinstance(model.layers[0].mlp, llama.MLP) and type(model.layers[0]) is llama.TransformerBlock
        assert model.parameters() == parameters
        got = model(LONG)
    assert not mx.array_equal(got, want), "it computes in another way"
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-3, atol=1e-3)


def test_only_mlx_lms_own_functions_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "swiglu", own := lambda gate, x: gate + x)
    model = make_model("llama")
    replace_functions(model)
    assert _function_of(model.layers[0].mlp, "swiglu") is own
    assert type(model.layers[0].mlp) is llama.MLP


def test_a_method_that_a_subclass_overrides_stays_overridden() -> None:
    class Mine(llama.MLP):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            return x

    model = make_model("llama")
    model.layers[0].mlp.__class__ = Mine
    replace_functions(model)
    assert type(model.layers[0].mlp) is Mine
    assert _function_of(model.layers[1].mlp, "swiglu") is swiglu


def test_other_models_of_the_architecture_compute_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a target of one model leaves mlx-lm, and a second model of its classes, bit for bit as they were."""
    monkeypatch.delenv(SWITCH, raising=False)
    theirs = llama.swiglu, llama.scaled_dot_product_attention
    classes = llama.MLP.__call__, llama.Attention.__call__
    other = make_model("llama", seed=1)
    want = mx.array(other(LONG))
    mx.eval(want)
    target = make_target("llama", seed=0)
    if not on_gpu():
        assert _function_of(target.model.layers[0].mlp, "swiglu") is not theirs[0], "the target has its own"
    assert (llama.swiglu, llama.scaled_dot_product_attention) == theirs
    assert llama.swiglu is activations.swiglu
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert (llama.MLP.__call__, llama.Attention.__call__) == classes
    assert type(other.layers[0].mlp) is llama.MLP and type(other.layers[0].self_attn) is llama.Attention
    assert mx.array_equal(other(LONG), want)
    assert mx.array_equal(make_model("llama", seed=1)(LONG), want), "nor is one that is made later"


def test_the_gradient_of_mlx_lms_swiglu_stays_finite() -> None:
    """The form through a power of two has none at -100, so a process that trains must not get it."""
    make_target("llama")
    gate, x = mx.full((8000,), -100.0), mx.ones((8000,))
    gradient = mx.grad(lambda g: llama.swiglu(g, x).sum())(gate)
    assert mx.all(mx.isfinite(gradient)).item()
