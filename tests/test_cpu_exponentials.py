"""exp and SiLU through powers of two: MLX's own values and gradients, also where the power overflows."""

from __future__ import annotations

import pytest

from redrafter_mlx.cpu.exponentials import exponential, silu

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

X = mx.array([-2000.0, -200.0, -90.0, -5.0, -0.1, 0.0, 0.1, 3.0, 80.0, 2000.0])


def test_silu_and_its_gradient_are_mlxs_own() -> None:
    np.testing.assert_allclose(np.array(silu(X)), np.array(nn.silu(X)), atol=1e-6)
    ours = mx.grad(lambda x: (silu(x) ** 2).sum())(X)
    theirs = mx.grad(lambda x: (x * mx.sigmoid(x)).square().sum())(X)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_silu_of_16_bits(dtype: mx.Dtype) -> None:
    x = X.astype(dtype)
    got = silu(x)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.array(got.astype(mx.float32)), np.array(nn.silu(x.astype(mx.float32))), rtol=2e-2, atol=1e-3
    )


def test_exponential() -> None:
    np.testing.assert_allclose(np.array(exponential(X[3:8])), np.exp(np.array(X[3:8])), rtol=1e-5)
    assert exponential(X[0]).item() == 0
