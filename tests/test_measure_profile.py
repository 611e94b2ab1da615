"""A step taken apart: the profile does the real steps, operations and bytes are counted."""

from __future__ import annotations

import pytest

from tests.toy import make

# isort: split
from redrafter_mlx.measure.profile import bytes_per_step, ops_per_step, profile
from redrafter_mlx.sampling import Sampling


@pytest.mark.parametrize("draft", ["off", "1x4", "3x4@6"])
def test_profile_does_the_same_steps(draft: str) -> None:
    model = make("llama")
    milliseconds = profile(model, [1, 2, 3], draft, 20, Sampling(temperature=0.5, seed=1))
    assert milliseconds["verify"] > 0 and milliseconds["host"] > 0
    assert (milliseconds["draft"] > 0.05) == (draft != "off"), "plain steps draft nothing"


def test_operations_and_bytes() -> None:
    model = make("llama")
    plain = ops_per_step(model, [1, 2], "off", Sampling())
    drafted = ops_per_step(model, [1, 2], "3x4@6", Sampling())
    assert 20 < plain < drafted
    read = bytes_per_step(model, beam_length=4)
    assert model.drafter is not None and read["drafter"] == 3 * model.drafter.nbytes
    assert bytes_per_step(model, beam_length=1)["drafter"] == 0
    whole = sum(a.nbytes for _, a in _parameters(model.target.model))
    assert read["target"] == whole - model.target.embedding.weight.nbytes, "a mere look-up is not read"


def _parameters(module):  # type: ignore[no-untyped-def]
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())
