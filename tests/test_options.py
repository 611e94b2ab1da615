"""Any combination of options either works or is one clear error, and drafted text is plain text under all of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.toy import VOCAB, make

# isort: split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redrafter_mlx.generation import Model, generate
from redrafter_mlx.sampling import Sampling

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "x", b"x", [], {}, float("nan"), float("inf"), -1, 2**70, 1.5]
)
BIASES = [{}, {3: 2.0}, {"4": -100}, {VOCAB: 1.0}, {-1: 1}, {2: float("nan")}, {"a": 1}]
PROMPTS = [[], [VOCAB], [-1], [1.0]]
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.0, 1e-40, 1e-7, 0.3, 1.0, 5.0, 1e9]) | ODD,
        "top_p": st.sampled_from([0, 1e-12, 0.5, 1.0]) | ODD,
        "top_k": st.sampled_from([0, 1, 5, VOCAB, 10**6]) | ODD,
        "min_p": st.sampled_from([0, 0.1, 1.0]) | ODD,
        "seed": st.sampled_from([0, 1, 2**32, 2**64 - 1]) | ODD,
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]) | ODD,
        "presence_penalty": st.sampled_from([-1.0, 0.0, 2.0]) | ODD,
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 2.0]) | ODD,
        "logit_bias": st.sampled_from(
            [{}, {3: 2.0}, {"4": -100}, {VOCAB: 1.0}, {-1: 1}, {2: float("nan")}, {"a": 1}]
        )
        | ODD,
    },
)
OPTIONS = st.fixed_dictionaries(
    {"prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40) | st.sampled_from(PROMPTS) | ODD},
    optional={
        "max_tokens": st.integers(1, 12) | st.sampled_from([0, 600, "3"]) | ODD,
        "draft": st.sampled_from(["off", "1x2", "1x5", "3x4", "4x5@8", "8x5@33", "3x1", "0x2", "70x2", "auto "]) | ODD,
        "stop": st.sampled_from([None, [], ["a"], [""], "a", [3]]) | ODD,
        "raw": st.booleans(),
        "kv_bits": st.sampled_from([None, 8, 7]),
    },
)  # fmt: skip


@cache
def model() -> Model:
    return make("llama")


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(SAMPLING, OPTIONS)
def test_it_works_or_is_one_clear_error(sampling: dict[str, Any], options: dict[str, Any]) -> None:
    prompt = options.pop("prompt")
    try:
        made = Sampling(**sampling)
        _, stats = generate(model(), prompt, sampling=made, **{"draft": "2x3", "max_tokens": 5, **options})
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    wanted = options.get("max_tokens", 5)
    assert stats.generated_tokens == wanted and stats.finish_reason == "length", "no option was ignored"
    if made.is_greedy or made.seed is not None:
        _, plain = generate(model(), prompt, sampling=made, **{"max_tokens": 5, **options, "draft": "off"})
        assert plain.token_ids == stats.token_ids


def test_odd_values_are_refused_by_name() -> None:
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"):
        with pytest.raises(ValueError, match=name):
            Sampling(**{name: "x"})
