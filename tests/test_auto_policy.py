"""`auto`: identical text, no slower where drafting cannot pay, wide where it does. All times are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from tests.toy import make

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.auto.learned import AcceptanceModel, AutoSettings, Learned
from redrafter_mlx.auto.policy import Auto
from redrafter_mlx.auto.table import CostTable
from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.generation import generate
from redrafter_mlx.policy import Outcome
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import Beam, Candidates


def costs(slope: float, draft: float = 0.02) -> CostTable:
    """A forward costs 1 + slope per further row; a level of the draft costs `draft`."""
    rows = {n: 1 + slope * (n - 1) for n in (1, 2, 4, 8, 16, 32)}
    return CostTable(rows, {1: draft, 8: draft}, {1: draft, 8: draft})


def policy_of(
    learned: Learned, greedy: bool = True, max_width: int = 64, max_length: int | None = None
) -> Auto:
    """The policy for a drafter of which only the limits matter."""
    limits = SimpleNamespace(max_width=max_width, max_length=max_length)
    return Auto(learned, greedy, cast(Drafter, limits))


def found(logprobs: np.ndarray) -> Candidates:
    """A search with these log-probabilities (L-1, W) of the paths; its tokens do not matter to a policy."""
    height, width = logprobs.shape
    parents = np.repeat(np.arange(-1, height - 1), width) * width
    return Candidates(
        mx.zeros((height * width,), dtype=mx.int32),
        mx.array(np.where(parents < 0, -1, parents), dtype=mx.int32),
        mx.array(logprobs.reshape(-1), dtype=mx.float32),
        height,
    )


def drive(policy: Auto, steps: int, level_prob: float, accepts: bool) -> tuple[list[int], float, int]:
    """Run a policy against a drafter that gives every level's best token `level_prob`, and is right or wrong.

    Returns the nodes verified in each step, the seconds spent by the policy's own table, and tokens made.
    """
    table = policy.learned.table
    truth = table.verify_seconds()
    seen, seconds, tokens = [], 0.0, 0
    for _ in range(steps):
        beam = policy.shape()
        if beam is None:
            seen.append(1)
            seconds, tokens = seconds + truth[1], tokens + 1
            policy.observe(Outcome(None, None, 0, truth[1]))
            continue
        assert beam.nodes is not None
        ranks = np.arange(beam.width)
        best = np.log(level_prob) * np.arange(1, beam.length)[:, None]
        logprobs = best + np.log(np.where(ranks == 0, 1, (1 - level_prob) / 4 / np.maximum(ranks, 1)))
        chosen = np.argsort(-logprobs.reshape(-1), kind="stable")[: beam.nodes - 1]
        accepted = int((chosen % beam.width == 0).sum()) if accepts else 0
        now = truth[beam.nodes] + table.draft_seconds(beam.width, beam.length)
        policy.observe(Outcome(beam, found(logprobs), accepted, now))
        seen.append(beam.nodes)
        seconds, tokens = seconds + now, tokens + 1 + accepted
    return seen, seconds, tokens


def test_flat_cost_and_a_good_drafter_draft_wide() -> None:
    learned = Learned(costs(0.01))
    seen, seconds, tokens = drive(policy_of(learned), 200, 0.8, True)
    assert np.median(seen) >= 5 and tokens / seconds > 2
    assert not learned.gave_up


def test_steep_cost_shrinks_to_a_chain() -> None:
    policy = policy_of(Learned(costs(0.4)))
    drive(policy, 200, 0.8, True)
    assert policy.model.best is not None and policy.model.best.width == 1


@pytest.mark.parametrize("slope", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("prob", [0.05, 0.9])
def test_a_drafter_that_is_always_wrong_costs_next_to_nothing(slope: float, prob: float) -> None:
    """However sure of itself it is. 256 steps of a fresh process keep 95 % of plain decoding's speed."""
    learned = Learned(costs(slope, draft=0.1))
    _, seconds, tokens = drive(policy_of(learned), 256, prob, False)
    _, later, more = drive(policy_of(learned), 256, prob, False)
    assert more / later > 0.97
    assert tokens / seconds > (0.95 if slope < 0.5 else 0.9)
    assert learned.gave_up


def test_a_bad_run_at_a_depth_is_forgotten_when_it_is_no_longer_drafted() -> None:
    model = AcceptanceModel()
    for _ in range(60):
        model.update(np.array([0.5, 0.3]), 1)
    assert model.trust[1] < 0.25 and model.trust[0] == 1.5
    for _ in range(500):
        model.update(np.array([0.5]), 1)
    assert model.trust[1] > 0.8


def test_a_depth_seldom_drafted_is_trusted_as_the_one_above_it() -> None:
    model = AcceptanceModel()
    for _ in range(200):
        model.update(np.array([0.8]), 0)
    assert model.trust[0] < 0.05 and np.all(model.trust[1:] < 0.05), "nothing below it can be accepted either"
    for _ in range(200):
        model.update(np.array([0.5, 0.4]), 2)
    assert model.trust[1] == 1.5 and model.trust[2] == 1.5


def test_it_comes_back() -> None:
    """Off with a wrong drafter; on again when the drafter is right."""
    policy = policy_of(Learned(costs(0.05)))
    drive(policy, 100, 0.9, False)
    assert policy.model.plain_left > 0
    seen, _, _ = drive(policy, 1500, 0.9, True)
    assert np.mean(np.array(seen[-200:]) > 1) > 0.9


def test_no_trial_where_even_a_perfect_drafter_would_lose() -> None:
    learned = Learned(costs(1.0, draft=0.1))
    seen, _, _ = drive(policy_of(learned), 300, 0.99, True)
    assert set(seen) == {1} and learned.gave_up


def test_the_verdict_outlives_a_generation() -> None:
    learned = Learned(costs(0.3))
    drive(policy_of(learned), 20, 0.05, False)
    seen, _, _ = drive(policy_of(learned), 10, 0.05, False)
    assert set(seen) == {1}, "the second generation need not try again"
    assert policy_of(learned, greedy=False).shape() is not None, "sampling has a verdict of its own"


def test_times_correct_the_table() -> None:
    learned = Learned(costs(0.05))
    for _ in range(60):
        learned.note_time(1, 1.5)
    assert learned.verify[1] == pytest.approx(1.5, abs=0.02)
    assert learned.verify[8] > 1.05 * costs(0.05).verify_seconds()[8], "the machine is slower for all sizes"
    learned.note_time(1, 99.0)  # a pause of the process, not of the model
    assert learned.verify[1] == pytest.approx(1.5, abs=0.02)


def test_verdict_by_hand() -> None:
    policy = policy_of(Learned(costs(0.2, draft=0.0)))
    probs = np.array([[0.9, 0.05], [0.5, 0.2], [0.1, 0.05]])
    # a further row costs 0.2 of a step; 0.9 and 0.5 are worth it, 0.2 just not at (1 + 1.4) / 1.4
    best = policy._verdict(np.log(probs)[None], np.ones(3), policy.settings.margin)
    assert best == Beam(1, 3, 3)


def test_a_draft_stays_within_the_drafters_limits() -> None:
    """Also where drafting is free, so that the widest and longest draft would be best."""
    policy = policy_of(Learned(costs(0.0, draft=0.0)), max_width=3, max_length=4)
    drafted = 0
    for _ in range(100):
        beam = policy.shape()
        if beam is None:  # now and then, to see what a plain step costs
            policy.observe(Outcome(None, None, 0, 1.0))
            continue
        assert beam.width <= 3 and beam.length <= 4
        drafted += 1
        policy.observe(
            Outcome(beam, found(np.full((beam.length - 1, beam.width), -0.1)), beam.length - 1, 1.0)
        )
    assert drafted > 90
    assert policy_of(Learned(costs(0.0)), max_width=1, max_length=2).shape() == Beam(1, 2, 2)


def test_settings_are_those_that_were_learned_with() -> None:
    settings = AutoSettings(first_pause=4, longest_pause=8)
    learned = Learned(costs(0.05), settings)
    seen, _, _ = drive(policy_of(learned), 100, 0.9, False)
    drafted = np.flatnonzero(np.array(seen) > 1)
    assert np.diff(drafted).max() == 9, "a trial after every longest pause"
    assert drafted.size >= 10


def test_text_is_plain_decodings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafting that goes on and off many times."""
    drafts: list[bool] = []
    original = Auto.shape

    def shape(self: Auto) -> Beam | None:
        beam = original(self)
        drafts.append(beam is not None)
        return beam

    monkeypatch.setattr(Auto, "shape", shape)
    model = make("llama")
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=1)):
        _, plain = generate(model, [1, 2, 3], max_tokens=120, sampling=sampling, draft="off")
        model.learned = Learned(costs(0.05), AutoSettings(first_pause=2, longest_pause=4))
        drafts.clear()
        _, stats = generate(model, [1, 2, 3], max_tokens=120, sampling=sampling, draft="auto")
        assert np.abs(np.diff(np.array(drafts, dtype=int))).sum() >= 6
        assert stats.token_ids == plain.token_ids
        assert 0 < stats.drafted_tokens < 3 * stats.steps


def with_lookup(seconds: float = 0.0) -> CostTable:
    rows = {n: 1 + 0.05 * (n - 1) for n in (1, 2, 4, 8, 16, 32)}
    return CostTable(rows, {}, {}, waiting=seconds)


def test_without_a_drafter_a_step_waits_only_where_a_lookup_pays() -> None:
    policy = Auto(Learned(with_lookup(0.1)), True, None)
    assert policy.shape() is None and policy.lookup_shape == policy.settings.lookup
    assert not policy.awaits([]) and not policy.awaits([0.1, 0.05])
    assert policy.awaits([0.9, 0.8, 0.7])
    assert not Auto(Learned(with_lookup(9.0)), True, None).awaits([0.9, 0.8, 0.7]), "waiting costs too much"


def test_rows_grow_with_what_was_looked_up() -> None:
    policy = Auto(Learned(with_lookup()), True, None)
    assert policy.rows(None, [0.01]) is None
    assert policy.rows(None, [0.9, 0.01]) == 2
    assert policy.rows(None, [0.99**n for n in range(1, 17)]) == 16, "as many as the settings allow of 17"


def test_rows_never_fall_short_of_the_draft() -> None:
    learned = Learned(costs(0.05))
    drive(policy_of(learned), 60, 0.8, True)
    policy = policy_of(learned)
    beam = policy.shape()
    assert beam is not None and beam.nodes is not None
    assert policy.rows(beam, [0.001]) is None, "every verified candidate of the draft is likelier"
    few, many = policy.rows(beam, [0.9]), policy.rows(beam, [0.9**n for n in range(1, 9)])
    assert few is not None and many is not None and many > few >= beam.nodes


def test_before_a_search_nothing_is_expected_of_the_drafter() -> None:
    policy = policy_of(Learned(costs(0.01)))
    assert policy.model.worth.size == 0
    beam = policy.shape()
    assert beam is not None and policy.rows(beam, [0.3]) is not None, (
        "a guess is not held against made-up ones"
    )


def test_a_drafter_has_to_pay_beside_the_lookup() -> None:
    """A drafter that is worth its time alone is turned off where the text repeats itself, and nothing else is."""
    alone, beside = Learned(costs(0.05, draft=0.2)), Learned(costs(0.05, draft=0.2))
    drive(policy_of(alone), 60, 0.6, True)
    assert not alone.gave_up
    policy = policy_of(beside)
    for _ in range(60):
        beam = policy.shape()
        text = [0.99**n for n in range(1, 17)]
        if beam is None:
            policy.observe(Outcome(None, None, 0, 1.0, 16, 17, text))
            continue
        ranks = np.arange(beam.width)
        logprobs = np.log(0.6) * np.arange(1, beam.length)[:, None] - 3.0 * (ranks > 0)
        policy.observe(Outcome(beam, found(logprobs), 2, 1.5, 16, 17, text))
    assert beside.gave_up
    assert policy.shape() is None and policy.awaits([0.99**n for n in range(1, 17)])


def test_a_table_that_steps_contradict_is_stale() -> None:
    learned = Learned(costs(0.05))
    for _ in range(40):
        learned.note_step(1, 3.0, 0.0)
        learned.note_step(4, 3 * 1.15, 0.0)
    assert not learned.is_stale, "a slower machine is slower for all"
    for _ in range(40):
        learned.note_step(4, 3 * 1.15 * 1.4, 0.0)
    assert learned.is_stale
