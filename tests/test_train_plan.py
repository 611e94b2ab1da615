"""What a run is said to take and bring before it starts, and when it is refused as too small."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from redrafter_mlx.train.curve import CURVE, PAYS_FROM, expected_tokens_per_step, positions_for
from redrafter_mlx.train.data import Watch
from redrafter_mlx.train.estimate import (
    TrainingSpeed,
    WritingSpeed,
    mean_seconds,
    measure_training,
    measure_writing,
)
from redrafter_mlx.train.plan import Deadline, Plan, saved_text
from redrafter_mlx.train.recipe import Recipe
from redrafter_mlx.train.request import Inputs, Request
from redrafter_mlx.train.run import DATA, check_target, write_data
from redrafter_mlx.train.settings import Origin, Settings
from redrafter_mlx.train.tally import Tally

from .toy import make_target
from .training import Killed, ToyTokenizer, asked, killer

# isort: split
import mlx.core as mx

PLAIN = Inputs([], None, [], None, Origin("tiny"))


def plan(tmp_path: Path, inputs: Inputs = PLAIN, **changes: object) -> Plan:
    """With speeds that are easy to reckon with: 10 ms a row of a step, and 1 s a training step of 256 positions."""
    request = Request(tmp_path / "out", **changes)
    speeds = WritingSpeed(0.0, 0.01), TrainingSpeed(1.0, 0.0, 0.0)
    return Plan(make_target(), request, inputs, *speeds, saved_text(request.out / DATA))


def test_the_curve_goes_through_what_was_measured_and_rises() -> None:
    points = json.loads(CURVE.read_text())["points"]
    for point in points:
        found = expected_tokens_per_step(point["positions"])
        assert found == pytest.approx(point["tokens_per_step"])
    values = [expected_tokens_per_step(10**exponent) for exponent in (0, 2, 3, 4, 4.5, 5, 6, 7)]
    assert values == sorted(values) and values[0] == pytest.approx(1, abs=1e-4)
    assert values[-1] == points[-1]["tokens_per_step"], "nothing is promised beyond what was measured"


@pytest.mark.parametrize("wanted", [1.1, PAYS_FROM, 1.5, 2.0])
def test_the_curve_read_backwards(wanted: float) -> None:
    positions = positions_for(wanted)
    assert expected_tokens_per_step(positions) >= wanted
    assert expected_tokens_per_step(positions / 1.12) < wanted


def test_writing_is_reckoned_from_steps_and_rows() -> None:
    recipe = Recipe("tiny", rows=10, max_tokens=100)
    # two batches of 100 + 48 steps; 20 answers of 75 tokens and 48 of the prompt
    assert WritingSpeed(1.0, 0.0).seconds(20, recipe, asks=False) == pytest.approx(2 * 148)
    assert WritingSpeed(0.0, 1.0).seconds(20, recipe, asks=False) == pytest.approx(20 * (75 + 48))
    assert WritingSpeed(0.0, 1.0).seconds(20, recipe, asks=True) == pytest.approx(20 * (75 + 48 + 64))


def test_measured_speeds_are_those_of_the_work() -> None:
    """The mean of what is done after a warm-up that does not count."""
    calls: list[float] = []

    def work() -> None:
        time.sleep(0.2 if not calls else 0.01)
        calls.append(time.perf_counter())

    found = mean_seconds(work, 0.05)
    assert len(calls) >= 2
    assert found == pytest.approx((calls[-1] - calls[0]) / (len(calls) - 1), rel=0.2)


def test_a_machine_can_be_measured(tmp_path: Path) -> None:
    target, request = make_target(), Request(tmp_path / "out", rows=16)
    check_target(target, request, PLAIN)
    writing = measure_writing(target, 16)
    assert writing.step + 16 * writing.row > 0
    training = measure_training(request.shape.config(target), target, Settings())
    assert min(training.step, training.decode, training.calibrate) > 0


def test_an_estimate_adds_up(tmp_path: Path) -> None:
    made = plan(tmp_path, num_answers=1000, max_tokens=160)
    found = made.estimate()
    assert found.positions == 120_000
    assert found.writing == pytest.approx(1000 * (48 + 120 + 64) * 0.01)
    assert found.training == pytest.approx(2 * 120_000 * 0.95 / 256)
    assert found.seconds == found.writing + found.training + found.finishing
    assert found.tokens_per_step == pytest.approx(expected_tokens_per_step(114_000))


@pytest.mark.parametrize("minutes", [5, 60, 600])
def test_minutes_give_as_many_answers_as_fit(tmp_path: Path, minutes: float) -> None:
    found = plan(tmp_path, minutes=minutes, num_answers=None).estimate()
    assert 0.9 * 60 * minutes < found.seconds <= 60 * minutes


def test_a_run_too_small_to_pay_is_refused_with_what_would_pay(tmp_path: Path) -> None:
    target = make_target(vocab_size=40_000, hidden_size=64)  # large enough that a run is no matter of seconds
    small = replace(plan(tmp_path, num_answers=100, max_tokens=160), target=target)
    message = (
        r"too small to pay: about 12,000 tokens .* 1\.2\d tokens per step.*--self-prompt \d+ .*--allow-small"
    )
    with pytest.raises(ValueError, match=message):
        small.warning(allow_small=False)
    assert "too small to pay" in (small.warning(allow_small=True) or "")
    for answers in (1000, small.answers_that_pay()):
        enough = replace(small, request=replace(small.request, num_answers=answers))
        assert enough.warning(allow_small=False) is None


def test_a_toy_is_warned_and_not_refused(tmp_path: Path) -> None:
    assert "too small to pay" in (plan(tmp_path, num_answers=24, max_tokens=24).warning(False) or "")


def test_text_that_is_there_need_not_be_written(tmp_path: Path) -> None:
    target, tokenizer = make_target(), ToyTokenizer()
    request = Request(tmp_path / "out", num_answers=12, rows=4, max_tokens=12)
    inputs = replace(PLAIN, prompts=asked(*(f"q{c}" for c in "abcdefghijkl")))
    check_target(target, request, inputs)
    with pytest.raises(Killed):
        write_data(target, tokenizer, request, inputs, killer(30))
    answers, tokens = saved_text(request.out / DATA)
    assert answers in (4, 8) and tokens > 0
    made = plan(tmp_path, inputs, num_answers=12, rows=4, max_tokens=12)
    assert made.estimate().writing == pytest.approx((12 - answers) * (48 + 9) * 0.01)
    (request.out / DATA / "shard-00000.npz").write_bytes(b"")
    assert saved_text(request.out / DATA)[0] == answers - 4


def test_a_deadline_leaves_time_to_train_and_remembers_what_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("redrafter_mlx.train.plan.time.monotonic", lambda: now[0])
    made = plan(tmp_path, minutes=10, num_answers=None)
    tally = Tally(None, 160, asks=True)
    tally.save(10, 25_600)  # takes 2 x 25,600 x 0.95 / 256 = 190 s of training
    first = Deadline(made)
    rest = 600 - 190 - made.finishing_seconds(25_600)
    with first.running():
        now[0] = 100.0
        assert first.left(tally) == pytest.approx(rest - 100) and not first.is_over(tally)
    again = Deadline(made)
    with again.running():
        assert again.left(tally) == pytest.approx(rest - 100)
        now[0] += rest - 100.5
        assert not again.is_over(tally)
        now[0] += 1
        assert again.is_over(tally)


def test_a_tally_forecasts_from_what_was_written() -> None:
    tally = Tally(wanted=20, max_tokens=100, asks=True)
    assert tally.tokens_left == 20 * (75 + 64)
    tally.begin("questions", 10)
    tally.step(10, 2)
    assert tally.tokens_left == 20 * (75 + 64) - 10
    for _ in range(9):
        tally.step(10, 10)
    tally.end_questions(5)  # 100 tokens for 5 usable ones: 20 each
    assert tally.question_mean == 20 and tally.tokens == 100
    tally.begin("answers", 5)
    tally.step(50, 1)
    assert tally.positions == 50
    assert tally.tokens_left == 20 * 75 + 15 * 20 - 50
    tally.save(5, 200)  # 40 each
    assert tally.tokens_left == 15 * (40 + 20) and tally.positions == 200


def test_a_step_of_a_batch_is_one_forward_over_all_its_rows(tmp_path: Path) -> None:
    """What makes writing fast: large matrix products, 4 rows in all of them, though one prompt is longer."""
    target, request = make_target(), Request(tmp_path / "out", num_answers=4, rows=4, max_tokens=12)
    inputs = replace(PLAIN, prompts=asked("aa", "bb", "cc", "dddd"))
    check_target(target, request, inputs)
    sizes: list[tuple[int, ...]] = []
    forward = target.forward

    def noted(tokens: mx.array, cache: list[object]) -> tuple[mx.array, mx.array]:
        sizes.append(tokens.shape)
        return forward(tokens, cache)

    target.forward = noted  # type: ignore[method-assign]
    steps: list[int] = []
    write_data(
        target, ToyTokenizer(), request, inputs, Watch(lambda tally: steps.append(tally.answer_tokens))
    )
    assert sizes[0][0] == 4 and len(sizes) <= 1 + 12 + 2
    assert sum(rows for rows, _ in sizes) >= steps[-1]
    assert steps == sorted(steps) and steps[-1] > 12
