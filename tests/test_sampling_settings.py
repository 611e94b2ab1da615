"""The settings of sampling: what is refused, and when."""

from __future__ import annotations

import pytest

from redrafter_mlx.generation import generate
from redrafter_mlx.sampling import Sampling
from tests.toy import VOCAB, make


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2},
        {"seed": -1}, {"seed": 2**64}, {"seed": 1.5}, {"seed": True}, {"top_k": True}, {"top_k": 2.0},
        {"temperature": "1"}, {"temperature": float("inf")}, {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")}, {"presence_penalty": float("nan")},
        {"frequency_penalty": float("-inf")}, {"logit_bias": {3: float("nan")}}, {"logit_bias": {"a": 1.0}},
        {"logit_bias": {3.5: 1.0}}, {"logit_bias": [1, 2]},
    ],
)  # fmt: skip
def test_impossible_settings(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def test_keys_as_json_has_them() -> None:
    assert Sampling(logit_bias={"7": 2}).logit_bias == {7: 2.0}  # type: ignore[dict-item]


def test_bias_of_a_token_that_is_not_there_is_refused_before_any_work() -> None:
    model = make("llama")
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"logit_bias must name tokens in 0..{VOCAB - 1}, not {token}"):
            generate(model, [1], sampling=Sampling(logit_bias={token: 1.0}))
