"""The losses of one row: each against NumPy written out, their gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from redrafter_mlx.train.criteria import (
    LOSSES,
    Loss,
    frozen_head_kl,
    head_loss,
    shared_noise_acceptance,
)

# isort: split
import mlx.core as mx

M, V, X = 6, 9, 4


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """features (M, X), matrix (V, X), probs (M, V) of which some lack mass, tokens (M, 1), one outside."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(V), M) * np.array([1, 1, 0.5, 1, 0.9, 1])[:, None]
    return rng.normal(size=(M, X)), rng.normal(size=(V, X)), probs, np.array([[0], [3], [-1], [8], [2], [2]])


def kl(p: np.ndarray, q: np.ndarray, token: int) -> float:
    return float(-(p * np.log(q)).sum())


def tv(p: np.ndarray, q: np.ndarray, token: int) -> float:
    entropy = -math.log(q[token]) if token >= 0 else 0.0
    return float(0.1 * entropy + 0.9 * (1 - np.minimum(p, q).sum()))


def lk(p: np.ndarray, q: np.ndarray, token: int, share: float | None = None) -> float:
    accepted = np.minimum(p, q).sum()
    share = math.exp(-3 * accepted) if share is None else share
    return float(share * kl(p, q, token) + (1 - share) * (1 - accepted))


def acceptance(p: np.ndarray, q: np.ndarray) -> float:
    """The sum as it stands in the formula; a token outside the vocabulary holds what p lacks and nothing of q."""
    p, q = np.append(p, 1 - p.sum()), np.append(q, 0.0)
    terms = [1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(len(p) - 1)]
    return float(sum(terms))


def gumbel(p: np.ndarray, q: np.ndarray, token: int) -> float:
    return -math.log(acceptance(p, q))


WRITTEN_OUT: dict[Loss, Callable[..., float]] = {"kl": kl, "tv": tv, "lk": lk, "gumbel": gumbel}


def guesses(features: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    powers = np.exp(features @ matrix.T)
    return powers / powers.sum(axis=-1, keepdims=True)


def test_cross_entropy_by_hand() -> None:
    """Two rows over three tokens; logits ln 1, ln 2, ln 5 and ln 4, ln 4, ln 8."""
    features = mx.array([[0.0, math.log(2), math.log(5)], [math.log(4), math.log(4), math.log(8)]])
    probs = mx.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    mass = probs.sum(axis=1, keepdims=True)
    losses, gradient, normalizers = frozen_head_kl(features, mx.eye(3), probs, mass)
    np.testing.assert_allclose(np.array(normalizers[:, 0]), [math.log(8), math.log(16)], atol=1e-5)
    # row 1: -(ln 1/8 + ln 2/8) / 2 = 1.732868; row 2: -ln 8/16 = 0.693147
    np.testing.assert_allclose(np.array(losses[:, 0]), [1.732868, 0.693147], atol=1e-5)
    want = [[1 / 8 - 0.5, 2 / 8 - 0.5, 5 / 8], [4 / 16, 4 / 16, 8 / 16 - 1]]
    np.testing.assert_allclose(np.array(gradient), np.array(want), atol=1e-5)


@pytest.mark.parametrize("block", [1 << 20, 4 * V * 2], ids=["one block", "two rows each"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_written_out(
    loss: Loss, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redrafter_mlx.train.criteria.LOGIT_BYTES", block)
    features, matrix, probs, tokens = rows()
    weights = np.array([[0.1], [0.3], [0.2], [0.2], [0.0], [1.0]])
    shares = [
        math.exp(-3 * np.minimum(p, q).sum()) for p, q in zip(probs, guesses(features, matrix), strict=True)
    ]

    def each(x: np.ndarray, m: np.ndarray) -> np.ndarray:
        """The losses; the share of `lk` is a constant of its gradient."""
        fixed = [(share,) if loss == "lk" else () for share in shares]
        found = zip(probs, guesses(x, m), tokens[:, 0], fixed, strict=True)
        return np.array([[WRITTEN_OUT[loss](p, q, t, *more)] for p, q, t, more in found])

    given = mx.array(probs.astype(np.float32)), mx.array(tokens.astype(np.int32))

    def ours(x: mx.array, m: mx.array, is_frozen: bool) -> mx.array:
        return (mx.array(weights.astype(np.float32)) * head_loss(loss, is_frozen)(x, m, *given)[0]).sum()

    x, m = mx.array(features.astype(np.float32)), mx.array(matrix.astype(np.float32))
    got, _, normalizers = head_loss(loss, True)(x, m, *given)
    np.testing.assert_allclose(np.array(got), each(features, matrix), atol=2e-5)
    np.testing.assert_allclose(
        np.array(normalizers)[:, 0], np.log(np.exp(features @ matrix.T).sum(axis=1)), atol=1e-5
    )
    by_x, by_m = mx.grad(lambda x, m: ours(x, m, False), argnums=(0, 1))(x, m)
    step = 1e-5
    for which, mine in ((0, by_x), (1, by_m)):
        for index in np.ndindex(*mine.shape):
            moved = []
            for sign in (1, -1):
                pair = [features.copy(), matrix.copy()]
                pair[which][index] += sign * step
                moved.append((weights * each(*pair)).sum())
            want = (moved[0] - moved[1]) / (2 * step)
            assert mine[index].item() == pytest.approx(want, abs=2e-4), (which, index)
    frozen = mx.grad(lambda x: ours(x, m, True))(x)
    np.testing.assert_allclose(np.array(frozen), np.array(by_x), atol=1e-6)


def test_kl_through_the_teachers_mean_row_is_kl() -> None:
    features, matrix, probs, tokens = (mx.array(a.astype(np.float32)) for a in rows(1))
    given = probs @ matrix, probs.sum(axis=1, keepdims=True)
    fast = frozen_head_kl(features, matrix, *given)
    plain = head_loss("kl", True)(features, matrix, probs, tokens.astype(mx.int32))
    for mine, theirs in zip(fast, plain, strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-5)


def test_acceptance_under_shared_noise_is_what_drawing_gives() -> None:
    """40,000 draws: the standard deviation of a share of 0.77 is 0.0021."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(12)), rng.dirichlet(np.ones(12))
    q = 0.7 * p + 0.3 * q
    noise = rng.gumbel(size=(40_000, 12))
    drawn = ((np.log(p) + noise).argmax(axis=1) == (np.log(q) + noise).argmax(axis=1)).mean()
    found = shared_noise_acceptance(
        mx.array(q[None].astype(np.float32)), mx.array(p[None].astype(np.float32))
    )[0]
    assert found.item() == pytest.approx(acceptance(p, q), abs=1e-5)
    assert found.item() == pytest.approx(drawn, abs=0.008)
    overlap = np.minimum(p, q).sum()
    assert overlap / (2 - overlap) <= found.item() <= overlap  # (1 - TV) / (1 + TV) and 1 - TV


@pytest.mark.parametrize("kept", [12, 40])
def test_a_rest_that_is_not_compared_one_by_one_costs_at_most_its_share(kept: int) -> None:
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.full(60, 0.1), 8), rng.dirichlet(np.full(60, 0.1), 8)
    q = 0.6 * p + 0.4 * q
    given = mx.array(q.astype(np.float32)), mx.array(p.astype(np.float32))
    found, gradient = shared_noise_acceptance(*given, kept=kept)
    for row in range(8):
        left_out = np.argsort(-(p[row] + q[row]))[kept:]
        exact = acceptance(p[row], q[row])
        assert abs(found[row].item() - exact) <= p[row][left_out].sum() + q[row][left_out].sum() + 1e-5


def test_the_gradient_with_a_rest_is_that_of_differences() -> None:
    """Against the formula with the rest as one more token that is never accepted, in double precision."""
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.full(30, 0.5), 4), rng.dirichlet(np.full(30, 0.5), 4)
    q = 0.7 * p + 0.3 * q
    found = shared_noise_acceptance(mx.array(q.astype(np.float32)), mx.array(p.astype(np.float32)), kept=10)
    for row in range(4):
        kept, rest = np.split(np.argsort(-(p[row] + q[row])), [10])

        def value(q: np.ndarray) -> float:
            mine = np.append(p[row][kept], p[row][rest].sum())  # noqa: B023
            theirs = np.append(q[kept], q[rest].sum())  # noqa: B023
            terms = [1 / np.maximum(mine / mine[i], theirs / theirs[i]).sum() for i in range(10)]
            return float(sum(terms))

        assert found[0][row].item() == pytest.approx(value(q[row]), abs=1e-5)
        for token in range(30):
            step = np.zeros(30)
            step[token] = 1e-7
            slope = (value(q[row] + step) - value(q[row] - step)) / 2e-7
            assert found[1][row, token].item() == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_acceptance_of_equal_extreme_and_disjoint_distributions() -> None:
    p = mx.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    q = mx.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0], [0.5, 0.25, 0.25]])
    found, gradient = shared_noise_acceptance(q, p)
    np.testing.assert_allclose(np.array(found[:, 0]), [1, 0.25, 0, 0], atol=1e-6)
    assert np.isfinite(np.array(gradient)).all()
    losses, error, _ = head_loss("gumbel", True)(mx.array([[200.0, 0.0], [0.0, 200.0]]), mx.eye(2),
        mx.array([[0.0, 1.0], [0.0, 1.0]]), mx.array([[1], [1]]))  # fmt: skip
    assert np.isfinite(np.array(losses)).all() and np.isfinite(np.array(error)).all()
