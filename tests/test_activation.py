import pytest

from tests.toy import make_model

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations, llama

from redrafter_mlx.activation import exponential, replace_swiglu, silu, swiglu

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


def test_models_of_an_architecture_take_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    model = make_model("llama")
    with mx.stream(mx.cpu):
        replace_swiglu(model)
    assert llama.swiglu is swiglu
    monkeypatch.setattr(llama, "swiglu", own := lambda gate, x: gate + x)
    replace_swiglu(model)
    assert llama.swiglu is own, "only mlx-lm's own is replaced"
