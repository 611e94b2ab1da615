"""Measuring on a machine that is never quiet: no first use fails, and the table is nearly that of a quiet one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.toy import make

# isort: split
import numpy as np

from redrafter_mlx.auto import timing
from redrafter_mlx.auto.table import CostTable
from redrafter_mlx.decode import Text
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.target import Target, Verified
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.tree import Beam, TokenTree

WIDTHS, LONG = (1, 2, 4, 8), 5
BEAMS = [Beam(width, 3, min(4, 1 + 2 * width)) for width in WIDTHS]
SLOPES = (0.02, 0.3, 1.0)  # of a further row, in plain steps


class Clock:
    """Time that only passes in jobs; what another program takes is added to some of them."""

    def __init__(self, rng: np.random.Generator, stutter: float) -> None:
        self.now = 0.0
        self.slept: dict[timing.Key, int] = {}
        self._rng, self._stutter = rng, stutter

    def perf_counter(self) -> float:
        return self.now

    def job(self, key: timing.Key, seconds: float) -> timing.Job:
        def run() -> float:
            taken = seconds * self._rng.uniform(1.0, 1.1)
            if self._rng.random() < self._stutter:
                taken += self._rng.exponential(0.2)
            self.now += taken
            self.slept[key] = self.slept.get(key, 0) + 1
            return taken

        return run


def quiet(slope: float) -> dict[timing.Key, float]:
    """Seconds of every job that `measure` times, on a quiet machine whose plain step takes 10 ms."""
    rows = {n: 0.01 * (1 + slope * (n - 1)) for n in timing.CPU_ROWS}
    drafts = {(w, length): 0.001 * (1 + 0.1 * w) * (length - 1) for w in WIDTHS for length in (2, LONG)}
    level = {w: (drafts[w, LONG] - drafts[w, 2]) / (LONG - 2) for w in WIDTHS}
    out: dict[timing.Key, float] = {("plain", 0, 0): rows[1], ("waiting", 4, 0): rows[4] + 0.0003}
    for beam in BEAMS:
        draft = drafts[beam.width, 2] + level[beam.width] * (beam.length - 2)
        out["drafted", beam.width, 0] = rows[beam.nodes or 0] + draft + 0.0005
    out |= {("draft", w, length): seconds for (w, length), seconds in drafts.items()}
    return out | {("rows", n, 0): seconds for n, seconds in rows.items()}


def first_use(slope: float, stutter: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> CostTable:
    clock = Clock(np.random.default_rng(seed), stutter)
    monkeypatch.setattr(timing, "time", clock)
    jobs = {key: clock.job(key, seconds) for key, seconds in quiet(slope).items()}
    table = timing._table(timing._interleaved(jobs, timing.BUDGET_SECONDS), BEAMS, LONG)
    return table


def step_seconds(table: CostTable) -> np.ndarray:
    """Seconds of every kind of step that may be chosen: plain ones, and those of all shapes and row counts."""
    verify, shapes = table.verify_seconds(), [(w, length) for w in WIDTHS for length in range(2, LONG + 1)]
    drafted = [verify[n] + table.draft_seconds(*shape) for shape in shapes for n in range(2, 33)]
    return np.array([verify[1], *drafted])


@pytest.mark.slow
@pytest.mark.parametrize("slope", SLOPES)
def test_two_hundred_first_uses_on_a_machine_that_stutters(
    slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of all samples takes 200 ms longer, twenty plain steps, more or less."""
    want = step_seconds(first_use(slope, 0.0, 0, monkeypatch))
    good = 0
    for seed in range(200):
        table = first_use(slope, 0.2, seed, monkeypatch)
        assert CostTable.from_dict(table.to_dict()) == table, "complete, and finite"
        ratio = step_seconds(table) / want
        good += bool(ratio.max() < 2 and ratio.min() > 0.5)
    assert good >= 190


@pytest.mark.parametrize("stutter", [0.5, 1.0])
def test_no_machine_is_too_busy_for_a_table(stutter: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        table = first_use(0.3, stutter, seed, monkeypatch)
        assert CostTable.from_dict(table.to_dict()) == table
        assert set(range(1, timing.ESSENTIAL_ROWS + 1)) <= set(table.rows)


def test_unrest_is_that_of_the_machine_not_of_single_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_use(0.3, 0.0, 0, monkeypatch).unrest < 1.1
    assert first_use(0.3, 0.1, 0, monkeypatch).unrest < timing.RESTLESS, (
        "a tenth of the samples took 20 steps longer"
    )
    assert first_use(0.3, 0.9, 0, monkeypatch).unrest > timing.RESTLESS


def scripted(calls: dict[int, int], rows: int, *seconds: float) -> timing.Job:
    """A job that takes 100 s to warm up, then these seconds, the last of them ever after."""

    def run() -> float:
        calls[rows] = calls.get(rows, 0) + 1
        return seconds[min(calls[rows] - 2, len(seconds) - 1)] if calls[rows] > 1 else 100.0

    return run


def test_the_fastest_samples_count_and_what_cannot_pay_is_timed_seldom() -> None:
    calls: dict[int, int] = {}
    jobs: dict[timing.Key, timing.Job] = {
        ("rows", 1, 0): scripted(calls, 1, 9.0, 1.0, 2.0, 1.5, 9.0),
        ("rows", 4, 0): scripted(calls, 4, 60.0),
        ("rows", 5, 0): scripted(calls, 5, 3.0, 4.0, 5.0),
        ("rows", 8, 0): scripted(calls, 8, 60.0),
        ("rows", 16, 0): scripted(calls, 16, 50.0, 2.0),
        ("rows", 24, 0): scripted(calls, 24, 70.0),
        ("rows", 32, 0): scripted(calls, 32, 1.0),
    }
    times = {key: timing._fastest(each) for key, each in timing._interleaved(jobs, budget=600).items()}
    assert times["rows", 1, 0] == (1.0 + 1.5 + 2.0) / 3
    assert times["rows", 5, 0] == 3.0 and times["rows", 8, 0] == 60.0
    assert times["rows", 16, 0] == 2.0, "slow by chance, the first time"
    assert ("rows", 32, 0) not in times, "two smaller ones took over five plain steps"
    often = 2 + timing.ROUNDS
    assert calls == {
        1: often,
        4: often,
        5: 4,
        8: 4,
        16: often + 1,
        24: 4,
    }  # 16: twice more at once, to be sure


def test_the_budget_ends_the_rounds_but_not_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget, rounds in ((0.0, timing.LEAST_ROUNDS), (1e9, timing.ROUNDS)):
        clock = Clock(np.random.default_rng(0), 0.0)
        monkeypatch.setattr(timing, "time", clock)
        key: timing.Key = ("rows", 1, 0)
        timing._interleaved({key: clock.job(key, 1.0)}, budget)
        assert clock.slept[key] == 2 + rounds


@pytest.mark.parametrize("slow", [pytest.param(1, marks=pytest.mark.slow), 2, 1000])
def test_a_slow_forward_over_two_rows_is_no_error(
    slow: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first `slow` ones take a second longer, by a clock that is put forward."""
    ahead, left = [0.0], [slow]
    original, real = Target.verify, timing.time.perf_counter  # type: ignore[attr-defined]

    def verify(self: Target, tree: TokenTree, cache: KVCache) -> Verified:
        if tree.num_nodes == 2 and left[0]:
            left[0] -= 1
            ahead[0] += 1.0
        return original(self, tree, cache)

    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: real() + ahead[0]))
    monkeypatch.setattr(Target, "verify", verify)
    model = make("llama")
    want = generate(model, [1, 2, 3], max_tokens=4, draft="off")[1].token_ids
    assert generate(model, [1, 2, 3], max_tokens=4)[1].token_ids == want
    assert left[0] < slow, "it was measured"
    assert model.learned is not None
    rows = model.learned.table.rows
    assert set(range(1, timing.ESSENTIAL_ROWS + 1)) <= set(rows)
    if slow < timing.LEAST_ROUNDS:
        assert rows[2] < 0.5, "slow by chance"


@pytest.fixture
def model() -> Model:
    return make("llama")


def test_measuring_a_model_gives_a_whole_table(model: Model) -> None:
    assert model.drafter is not None
    table = timing.measure(model.target, model.drafter, budget=0.0)
    assert CostTable.from_dict(table.to_dict()) == table
    assert set(table.first_level) == set(WIDTHS)
    assert all(fewer <= more for fewer, more in pairwise(table.rows[n] for n in sorted(table.rows)))


def test_a_table_says_what_decode_steps_take(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """Whatever forwards and searches take alone: plain steps are C(1), and drafted ones, on average, the sum of their
    parts."""
    new = iter((5.0, 6.0, 8.0, 9.0, 10.0, 12.0))  # plain, waiting for the text, and W = 1, 2, 4, 8
    known: dict[int, float] = {}

    def seconds(target: Target, text: Text) -> float:
        if id(text) not in known:
            known[id(text)] = next(new)
        return known[id(text)]

    monkeypatch.setattr(timing, "_step_seconds", seconds)
    monkeypatch.setattr(timing, "on_gpu", lambda: True)  # so that the forwards' times stay apart from C(1)
    assert model.drafter is not None
    table = timing.measure(model.target, model.drafter, budget=0.0)
    assert table.rows[1] == 5.0
    parts = [table.rows[beam.nodes or 0] + table.draft_seconds(beam.width, beam.length) for beam in BEAMS]
    # the median of four corrections: between the middle two
    assert 8.5 < np.mean(parts) < 11
    assert all(narrow <= wide for narrow, wide in pairwise(table.first_level[w] for w in WIDTHS))


@pytest.mark.parametrize(
    ("measured", "smoothed"),
    [
        ({1: 8.0, 2: 7.0, 4: 3.0, 8: 0.5}, {1: 4.625, 2: 4.625, 4: 4.625, 8: 4.625}),
        ({1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0}, {1: 1.0, 2: 2.5, 4: 2.5, 8: 4.0}),
        ({1: 1.0}, {1: 1.0}),
    ],
)
def test_more_is_never_cheaper(measured: dict[int, float], smoothed: dict[int, float]) -> None:
    assert timing.isotonic(measured) == smoothed


def test_steps_are_timed_without_one_launched_ahead(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock starts after a first step and stops after `STEPS` more."""
    events: list[str] = []

    def noted(name: str, result: Callable[[], object]) -> Callable[..., object]:
        def call(*_: object) -> object:
            events.append(name)
            return result()

        return call

    monkeypatch.setattr(timing, "step", noted("step", lambda: [[]]))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=noted("clock", lambda: len(events))))
    timing._step_seconds(model.target, None)
    assert events == ["step", "clock", *["step"] * timing.STEPS, "clock"]
