"""Predictions: rows that are free make the whole tree pay, rows at full price nothing."""

from __future__ import annotations

import pytest

from tests.speculators import make_speculator
from tests.toy import make, make_target

# isort: split
import numpy as np

from redrafter_mlx.auto.table import CostTable
from redrafter_mlx.generation import Model
from redrafter_mlx.measure.predict import SearchSample, predict, wide_searches


def test_prediction() -> None:
    """Rows nearly free: the whole tree pays. Rows at full price: nothing does, and it says so."""
    logprobs = np.log(np.array([[0.8, 0.1], [0.6, 0.1]]))
    sample = SearchSample([logprobs], np.ones(2), 2.4)
    flat = CostTable({1: 1.0, 64: 1.1}, {1: 0.01, 8: 0.01}, {1: 0.01, 8: 0.01})
    found = predict(flat, sample, (1, 2), (2, 3), (2, 3, 5))
    assert found.by_shape["1x2"] == pytest.approx(1.8 / (1.0 + 0.1 / 63 + 0.01), rel=1e-3)
    assert found.by_shape["1x3"] > found.by_shape["1x2"] and "auto will draft here" in found.advice
    steep = CostTable({1: 1.0, 64: 64.0}, {1: 0.1, 8: 0.1}, {1: 0.1, 8: 0.1})
    assert "auto will decode plainly" in predict(steep, sample, (1, 2), (2, 3), (2, 3, 5)).advice


def test_a_drafter_may_search_less_than_auto_would() -> None:
    model = Model(make_target("llama"))
    with pytest.raises(ValueError, match="no drafter"):
        wide_searches(model, [[1, 2, 3]], 20)
    speculator = make_speculator(n_predict=2)
    speculator.attach(model.target)
    model.drafter = speculator
    sample = wide_searches(model, [[1, 2, 3]], 20)
    assert sample.logprobs[0].shape == (2, 8)
    found = predict(CostTable({1: 1.0, 64: 1.1}, {1: 0.0}, {1: 0.0}), sample, (1, 8), (2, 3), (2, 17, 24))
    assert set(found.by_nodes) == {"2", "17"}, "there are no more than 17 nodes"


def test_wide_searches_see_what_is_accepted() -> None:
    sample = wide_searches(make("llama"), [[1, 2, 3]], 20)
    assert sample.logprobs[0].shape == (4, 8) and 1 <= sample.tokens_per_step <= 5
    assert sample.trust.shape == (4,) and np.all(sample.trust >= 0)
