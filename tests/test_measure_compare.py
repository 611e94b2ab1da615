"""Arms in turn: fair interleaving, and what the figures mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import make, save_folder

# isort: split
from redrafter_mlx.loading.load import load
from redrafter_mlx.measure.compare import (
    MT_BENCH,
    Arm,
    Comparison,
    Run,
    compare,
    encoded,
    mlx_lm_arm,
    own_arm,
    spread,
)
from redrafter_mlx.prompts import Request, read_requests, user
from redrafter_mlx.sampling import Sampling


def test_arms_are_interleaved_and_rotate() -> None:
    order: list[tuple[str, int]] = []

    def arm(name: str) -> Arm:
        def run(prompt: list[int]) -> Run:
            order.append((name, prompt[0]))
            return Run([1, 2], 0.1, 0.1)

        return run

    arms = {name: arm(name) for name in "abc"}
    *_, last = compare(arms, [[0], [1], [2]], ["x"] * 3, warmup=1)
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
    arms = {name: own_arm(model, draft, 12, Sampling()) for name, draft in (("plain", "off"), ("d", "3x4"))}
    *_, result = compare(arms, [[1, 2], [3]], ["a", "b"])
    for plain, drafted in zip(result.runs["plain"], result.runs["d"], strict=True):
        assert plain.token_ids == drafted.token_ids and len(plain.token_ids) == 12
        assert drafted.tokens_per_second > 0


def test_mlx_lm_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        mlx_lm_arm(make("llama"), 4, Sampling())


def test_shipped_prompts_are_mt_bench_and_spread() -> None:
    requests = read_requests(MT_BENCH)
    assert len(requests) == 80 and len({r.category for r in requests}) == 8
    assert len({r.category for r in spread(requests, 16)}) == 8
    assert spread(requests, None) == requests


def test_prompts_are_lengthened_before_their_own_text(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path))
    requests = [Request(0, "Why is the sky blue?"), Request(1, [user("Hello"), user("Name a fruit.")])]
    plain = encoded(model, requests, None)
    assert encoded(model, requests, 2) == plain, "long enough as they are"
    assert model.tokenizer is not None
    for own, longer in zip(plain, encoded(model, requests, 200), strict=True):
        assert abs(len(longer) - 200) <= 8
        assert longer[-10:] == own[-10:] and longer[0] == own[0]
        assert "Why is the sky" in model.tokenizer.decode(longer[: -len(own)])
    model.tokenizer = None
    with pytest.raises(ValueError, match="--context needs a tokenizer"):
        encoded(model, [], 200)
