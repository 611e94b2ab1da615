"""`auto`: identical text, no slower where drafting cannot pay, wide where it does. All times are made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.toy import make

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx import auto as auto_module
from redrafter_mlx import cost
from redrafter_mlx.auto import Auto, Experience, Mode
from redrafter_mlx.cost import CostTable, cache_path, cost_table
from redrafter_mlx.generation import generate
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import Levels


def table(slope: float, draft: float = 0.02) -> CostTable:
    """A forward costs 1 + slope per further row; a level of the draft costs `draft`."""
    rows = {n: 1 + slope * (n - 1) for n in (1, 2, 4, 8, 16, 32)}
    return CostTable(rows, {1: draft, 8: draft}, {1: draft, 8: draft})


def drive(policy: Auto, steps: int, level_prob: float, accepts: bool) -> tuple[list[int], float, int]:
    """Run a policy against a drafter that gives every level's best token `level_prob`, and is right or wrong.

    Returns the nodes verified in each step, the seconds spent by the policy's own table, and tokens made.
    """
    table = policy.known.table
    truth = table.verify_seconds()
    seen, seconds, tokens = [], 0.0, 0
    for _ in range(steps):
        beam = policy.shape()
        if beam is None:
            seen.append(1)
            seconds, tokens = seconds + truth[1], tokens + 1
            policy.observe(None, None, 0, truth[1])
            continue
        assert beam.nodes is not None
        ranks = np.arange(beam.width)
        best = np.log(level_prob) * np.arange(1, beam.length)[:, None]
        logprobs = best + np.log(np.where(ranks == 0, 1, (1 - level_prob) / 4 / np.maximum(ranks, 1)))
        chosen = np.argsort(-logprobs.reshape(-1), kind="stable")[: beam.nodes - 1]
        accepted = int((chosen % beam.width == 0).sum()) if accepts else 0
        now = truth[beam.nodes] + table.draft_seconds(beam.width, beam.length)
        levels = Levels(mx.zeros(logprobs.shape), mx.zeros(logprobs.shape), mx.array(logprobs))
        policy.observe(beam, levels, accepted, now)
        seen.append(beam.nodes)
        seconds, tokens = seconds + now, tokens + 1 + accepted
    return seen, seconds, tokens


def test_flat_cost_and_a_good_drafter_draft_wide() -> None:
    seen, seconds, tokens = drive(Auto(Experience(table(0.01)), True, 64), 200, 0.8, True)
    assert np.median(seen) >= 5 and tokens / seconds > 2


def test_steep_cost_shrinks_to_a_chain() -> None:
    policy = Auto(Experience(table(0.4)), True, 64)
    drive(policy, 200, 0.8, True)
    assert policy.mode.best is not None and policy.mode.best.width == 1


@pytest.mark.parametrize("slope", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("prob", [0.05, 0.9])
def test_a_drafter_that_is_always_wrong_costs_next_to_nothing(
    slope: float, prob: float, caplog: pytest.LogCaptureFixture
) -> None:
    """However sure of itself it is. 256 steps of a fresh process keep 95 % of plain decoding's speed."""
    experience = Experience(table(slope, draft=0.1))
    with caplog.at_level(logging.WARNING):
        _, seconds, tokens = drive(Auto(experience, True, 64), 256, prob, False)
        _, later, more = drive(Auto(experience, True, 64), 256, prob, False)
    assert more / later > 0.97
    assert tokens / seconds > (0.95 if slope < 0.5 else 0.9)
    said = [r for r in caplog.records if "does not pay" in r.message]
    assert len(said) == 1, "it says so once"


def test_a_bad_run_at_a_depth_is_forgotten_when_it_is_no_longer_drafted() -> None:
    mode = Mode()
    for _ in range(60):
        mode.hear(np.array([0.5, 0.3]), 1)
    assert mode.trust[1] < 0.25 and mode.trust[0] == 1.5
    for _ in range(500):
        mode.hear(np.array([0.5]), 1)
    assert mode.trust[1] > 0.8


def test_it_comes_back() -> None:
    """Off with a wrong drafter; on again when the drafter is right."""
    policy = Auto(Experience(table(0.05)), True, 64)
    drive(policy, 100, 0.9, False)
    assert policy.mode.plain_left > 0
    seen, _, _ = drive(policy, 1500, 0.9, True)
    assert np.mean(np.array(seen[-200:]) > 1) > 0.9


def test_no_trial_where_even_a_perfect_drafter_would_lose() -> None:
    seen, _, _ = drive(Auto(Experience(table(1.0, draft=0.1)), True, 64), 300, 0.99, True)
    assert set(seen) == {1}


def test_the_verdict_outlives_a_generation() -> None:
    experience = Experience(table(0.3))
    drive(Auto(experience, True, 64), 20, 0.05, False)
    seen, _, _ = drive(Auto(experience, True, 64), 10, 0.05, False)
    assert set(seen) == {1}, "the second generation need not try again"
    assert Auto(experience, False, 64).shape() is not None, "sampling has a verdict of its own"


def test_times_correct_the_table() -> None:
    known = Experience(table(0.05))
    for _ in range(60):
        known.note_time(1, 1.5)
    assert known.verify[1] == pytest.approx(1.5, abs=0.02)
    assert known.verify[8] > 1.05 * table(0.05).verify_seconds()[8], "the machine is slower for all sizes"
    known.note_time(1, 99.0)  # a pause of the process, not of the model
    assert known.verify[1] == pytest.approx(1.5, abs=0.02)


def test_verdict_by_hand() -> None:
    policy = Auto(Experience(table(0.2, draft=0.0)), True, 64)
    probs = np.array([[0.9, 0.05], [0.5, 0.2], [0.1, 0.05]])
    # a further row costs 0.2 of a step; 0.9 and 0.5 are worth it, 0.2 just not at (1 + 1.4) / 1.4
    best = policy._verdict(np.log(probs)[None], np.ones(3))
    assert best is not None and best.nodes == 3 and (best.width, best.length) == (1, 3)


def test_text_is_plain_decodings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "BUDGET_SECONDS", 0.2)
    monkeypatch.setattr(auto_module, "FIRST_PAUSE", 4)  # on and off many times
    monkeypatch.setattr(auto_module, "LONGEST_PAUSE", 8)
    model = make("llama")
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=1)):
        _, plain = generate(model, [1, 2, 3], max_tokens=120, sampling=sampling, draft="off")
        model.experience = None
        _, stats = generate(model, [1, 2, 3], max_tokens=120, sampling=sampling, draft="auto")
        assert stats.token_ids == plain.token_ids
        assert stats.syncs == stats.steps


def test_table_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "BUDGET_SECONDS", 0.1)
    model = make("llama")
    assert model.drafter is not None
    calls: list[int] = []
    original = cost.measure
    monkeypatch.setattr(cost, "measure", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    first = cost_table(model.target, model.drafter)
    assert cost_table(model.target, model.drafter).rows == first.rows and len(calls) == 1
    path = cache_path(model.target, model.drafter)
    assert all(value > 0 for value in json.loads(path.read_text())["rows"].values())
    path.write_text("{}")
    cost_table(model.target, model.drafter)
    assert len(calls) == 2, "a damaged file is measured again"
    wide = make("llama", exit_dim=128)
    assert wide.drafter is not None
    assert cache_path(wide.target, wide.drafter) != path
    monkeypatch.setattr(cost, "BLAS", "another.so")
    slow = cache_path(model.target, model.drafter)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert len({path, slow, cache_path(model.target, model.drafter)}) == 3, "another BLAS, other threads"


def test_the_table_says_what_decode_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever forwards and searches take alone: plain steps are C(1), and drafted ones, on average, the sum of their
    parts."""
    new = iter((0.5, 0.8, 0.9, 1.0, 1.2))  # plain, and W = 1, 2, 4, 8
    known: dict[Iterator[list[int]], float] = {}

    def seconds(steps: Iterator[list[int]]) -> float:
        if steps not in known:
            known[steps] = next(new)
        return known[steps]

    monkeypatch.setattr(cost, "_step_seconds", seconds)
    monkeypatch.setattr(cost, "on_gpu", lambda: True)  # so that the forwards' times stay apart from C(1)
    model = make("llama")
    assert model.drafter is not None
    table = cost.measure(model.target, model.drafter, budget=0.1)
    assert table.rows[1] == 0.5
    parts = [table.rows[3 if w == 1 else 4] + table.draft_seconds(w, 3) for w in (1, 2, 4, 8)]
    assert np.mean(parts) == pytest.approx(np.mean((0.8, 0.9, 1.0, 1.2)))
    assert all(narrow <= wide for narrow, wide in pairwise(table.first_level[w] for w in (1, 2, 4, 8)))


def test_measuring_takes_the_faster_half_and_dear_forwards_once() -> None:
    calls: dict[int, int] = {}

    def job(rows: int, *seconds: float) -> cost.Job:
        def run() -> float:
            calls[rows] = calls.get(rows, 0) + 1
            return seconds[min(calls[rows] - 2, len(seconds) - 1)] if calls[rows] > 1 else 100.0

        return run

    jobs = {("rows", 1, 0): job(1, 1.0, 2.0, 9.0), ("rows", 8, 0): job(8, 3.0), ("rows", 16, 0): job(16, 6.0),
            ("rows", 32, 0): job(32, 1.0)}  # fmt: skip
    times = cost._interleaved(jobs, budget=60)
    assert times == {("rows", 1, 0): (1 + 2 + 3 * 9) / 5, ("rows", 8, 0): 3, ("rows", 16, 0): 6}
    assert calls == {1: 2 + cost.ROUNDS, 8: 2, 16: 2}


def test_a_wider_search_is_never_cheaper() -> None:
    assert cost._rising({1: 8.0, 2: 7.0, 4: 3.0, 8: 0.5}) == dict.fromkeys((1, 2, 4, 8), 4.625)
    assert cost._rising({1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0}) == {1: 1.0, 2: 2.5, 4: 2.5, 8: 4.0}


def test_interpolation() -> None:
    seconds = CostTable({1: 1.0, 2: 1.5, 4: 2.5}, {1: 0.1, 8: 0.8}, {1: 0.2, 8: 0.9}).verify_seconds()
    assert seconds[:5].tolist() == pytest.approx([0, 1, 1.5, 2.0, 2.5])
    assert np.all(np.diff(seconds) > 0)
    assert CostTable({1: 1.0}, {1: 0.1, 8: 0.8}, {1: 0.2, 8: 0.9}).draft_seconds(8, 4) == pytest.approx(2.6)


def test_a_depth_seldom_drafted_is_trusted_as_the_one_above_it() -> None:
    mode = Mode()
    for _ in range(200):
        mode.hear(np.array([0.8]), 0)
    assert mode.trust[0] < 0.05 and np.all(mode.trust[1:] < 0.05), "nothing below it can be accepted either"
    for _ in range(200):
        mode.hear(np.array([0.5, 0.4]), 2)
    assert mode.trust[1] == 1.5 and mode.trust[2] == 1.5
