"""top-p, min-p and top-k keep what mlx-lm's keep."""

from __future__ import annotations

import pytest

import redrafter_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from redrafter_mlx.sampling import Sampling
from redrafter_mlx.sampling.filters import filtered


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [7, 1000])
def test_top_p_is_mlx_lms(top_p: float, size: int) -> None:
    mx.random.seed(size)
    logits = mx.random.normal((5, size)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    want = mx.isfinite(apply_top_p(logprobs, top_p))
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, top_p=top_p)))
    # the sums run in another order, so a token whose cumulative mass is top_p to 1e-6 may fall on either
    # side
    assert (want != got).sum().item() <= 1
    kept = mx.where(got, mx.softmax(logits, axis=-1), 0).sum(axis=-1)
    assert mx.all(kept >= top_p - 1e-5).item()


@pytest.mark.parametrize("k", [1, 2, 40, 999])
def test_top_k_is_mlx_lms(k: int) -> None:
    mx.random.seed(k)
    logits = mx.random.normal((4, 1000)) * 3
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, top_k=k)))
    assert mx.array_equal(got, mx.isfinite(apply_top_k(logits, k)))


def test_min_p_is_mlx_lms() -> None:
    logits = mx.random.normal((4, 300)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, min_p=0.05)))
    assert mx.array_equal(got, mx.isfinite(apply_min_p(logprobs, 0.05)))
