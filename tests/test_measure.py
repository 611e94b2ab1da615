"""Measuring: fair interleaving, what the figures mean, the profile and the counts of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import make, save_folder

# isort: split
import numpy as np

from redrafter_mlx import measure
from redrafter_mlx.cost import CostTable
from redrafter_mlx.loading import load
from redrafter_mlx.measure import Comparison, Looks, Run
from redrafter_mlx.prompts import Request, read_requests, user
from redrafter_mlx.sampling import Sampling


def test_arms_are_interleaved_and_rotate() -> None:
    order: list[tuple[str, int]] = []

    def arm(name: str) -> measure.Arm:
        def run(prompt: list[int]) -> Run:
            order.append((name, prompt[0]))
            return Run([1, 2], 0.1, 0.1)

        return run

    arms = {name: arm(name) for name in "abc"}
    *_, last = measure.compare(arms, [[0], [1], [2]], ["x"] * 3, warmup=1)
    assert order[:3] == [("a", 0), ("b", 0), ("c", 0)], "warm-up, not counted"
    assert [name for name, _ in order[3:]] == list("abcbcacab")
    assert all(len(runs) == 3 for runs in last.runs.values())


def test_rates_and_ratios() -> None:
    runs = {
        "plain": [Run([0] * 11, 0.0, s) for s in (1.0, 2.0, 4.0)],
        "drafted": [Run([0] * 11, 0.0, s) for s in (0.5, 1.0, 4.0)],
    }
    result = Comparison(["a", "a", "b"], runs)
    assert result.rate("plain")[1] == pytest.approx(5.0)
    assert result.ratio("drafted", "plain")[1] == pytest.approx(2.0)
    assert result.ratio("drafted", "plain", "b")[1] == pytest.approx(1.0)
    assert result.total("drafted") == pytest.approx(30 / 5.5)


def test_own_arms_agree_and_count() -> None:
    model = make("llama")
    arms = {
        name: measure.own_arm(model, draft, 12, Sampling())
        for name, draft in (("plain", "off"), ("d", "3x4"))
    }
    *_, result = measure.compare(arms, [[1, 2], [3]], ["a", "b"])
    for plain, drafted in zip(result.runs["plain"], result.runs["d"], strict=True):
        assert plain.token_ids == drafted.token_ids and len(plain.token_ids) == 12
        assert drafted.tokens_per_second > 0


def test_mlx_lm_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        measure.mlx_lm_arm(make("llama"), 4, Sampling())


@pytest.mark.parametrize("draft", ["off", "1x4", "3x4@6"])
def test_profile_does_the_same_steps(draft: str) -> None:
    model = make("llama")
    milliseconds = measure.profile(model, [1, 2, 3], draft, 20, Sampling(temperature=0.5, seed=1))
    assert milliseconds["verify"] > 0 and milliseconds["host"] > 0
    assert (milliseconds["draft"] > 0.05) == (draft != "off"), "plain steps draft nothing"


def test_operations_and_bytes() -> None:
    model = make("llama")
    plain = measure.ops_per_step(model, [1, 2], "off", Sampling())
    drafted = measure.ops_per_step(model, [1, 2], "3x4@6", Sampling())
    assert 20 < plain < drafted
    read = measure.bytes_per_step(model, beam_length=4)
    assert model.drafter is not None and read["drafter"] == 3 * model.drafter.nbytes
    assert measure.bytes_per_step(model, beam_length=1)["drafter"] == 0
    whole = sum(a.nbytes for _, a in _parameters(model.target.model))
    assert read["target"] == whole - model.target.embedding.weight.nbytes, "a mere look-up is not read"


def _parameters(module):  # type: ignore[no-untyped-def]
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())


def test_shipped_prompts_are_mt_bench_and_spread() -> None:
    requests = read_requests(measure.MT_BENCH)
    assert len(requests) == 80 and len({r.category for r in requests}) == 8
    assert len({r.category for r in measure.spread(requests, 16)}) == 8
    assert measure.spread(requests, None) == requests


def test_prediction() -> None:
    """Rows nearly free: the whole tree pays. Rows at full price: nothing does, and it says so."""
    logprobs = np.log(np.array([[0.8, 0.1], [0.6, 0.1]]))
    looks = Looks([logprobs], np.ones(2), 2.4)
    flat = CostTable({1: 1.0, 64: 1.1}, {1: 0.01, 8: 0.01}, {1: 0.01, 8: 0.01})
    found = measure.predict(flat, looks, (1, 2), (2, 3), (2, 3, 5))
    assert found.by_shape["1x2"] == pytest.approx(1.8 / (1.0 + 0.1 / 63 + 0.01), rel=1e-3)
    assert found.by_shape["1x3"] > found.by_shape["1x2"] and "auto will draft here" in found.advice
    steep = CostTable({1: 1.0, 64: 64.0}, {1: 0.1, 8: 0.1}, {1: 0.1, 8: 0.1})
    assert "auto will decode plainly" in measure.predict(steep, looks, (1, 2), (2, 3), (2, 3, 5)).advice


def test_wide_searches_see_what_is_accepted() -> None:
    looks = measure.wide_searches(make("llama"), [[1, 2, 3]], 20)
    assert looks.logprobs[0].shape == (4, 8) and 1 <= looks.tokens_per_step <= 5
    assert looks.trust.shape == (4,) and np.all(looks.trust >= 0)


def test_machine_names_itself() -> None:
    assert {"device", "chip", "os", "versions", "commit"} <= measure.machine().keys()


def test_prompts_are_lengthened_before_their_own_text(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path))
    requests = [Request(0, "Why is the sky blue?"), Request(1, [user("Hello"), user("Name a fruit.")])]
    plain = measure.encoded(model, requests, None)
    assert measure.encoded(model, requests, 2) == plain, "long enough as they are"
    assert model.tokenizer is not None
    for own, longer in zip(plain, measure.encoded(model, requests, 200), strict=True):
        assert abs(len(longer) - 200) <= 8
        assert longer[-10:] == own[-10:] and longer[0] == own[0]
        assert "Why is the sky" in model.tokenizer.decode(longer[: -len(own)])
    model.tokenizer = None
    with pytest.raises(ValueError, match="--context needs a tokenizer"):
        measure.encoded(model, [], 200)
