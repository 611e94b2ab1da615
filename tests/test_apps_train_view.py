"""What a training run shows while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from apps import train_view
from apps.train_view import View, WritingView, duration, show_training
from redrafter_mlx.train.settings import Progress
from redrafter_mlx.train.tally import Tally


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "under a minute"),
        (29, "under a minute"),
        (60, "about 1 min"),
        (89 * 60, "about 89 min"),
        (3 * 3600 + 11 * 60, "about 3 h 10 min"),
        (2 * 3600, "about 2 h"),
    ],
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def view(monkeypatch: pytest.MonkeyPatch, terminal: bool, width: int = 80) -> tuple[View, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    monkeypatch.setattr(train_view, "stderr", lambda: console)
    return View(), out


def test_a_log_gets_the_first_figure_at_once_and_then_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("apps.train_view.time.monotonic", lambda: now[0])
    shown, out = view(monkeypatch, terminal=False)
    with shown:
        for step in range(100):
            now[0] += 1.0
            shown.show("writing", step / 100, f"step {step}")
        shown.say("a remark")
        shown.show("training", 0.5, "halfway")
    assert out.getvalue().splitlines() == [
        "writing 0%: step 0",
        "writing 30%: step 30",
        "writing 60%: step 60",
        "writing 90%: step 90",
        "writing 99%: step 99",
        "a remark",
        "training 50%: halfway",
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_the_time_that_is_left_fits_into_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    now = [0.0]
    monkeypatch.setattr("apps.train_view.time.monotonic", lambda: now[0])
    shown, out = view(monkeypatch, terminal=True, width=width)
    tally = Tally(wanted=1000, max_tokens=160, asks=True)
    tally.begin("questions", 120)
    with shown:
        writing = WritingView(shown)
        now[0] = 10.0
        tally.step(2000, 37)
        writing.on_step(tally)
        now[0] = 20.0
    text = out.getvalue()
    left = (1000 * (120 + 64) - 2000) / 200
    assert f"{duration(left)} left, questions" in text
    assert max(map(len, text.splitlines())) <= width + 20, "control characters aside"


def test_training_shows_what_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = view(monkeypatch, terminal=False)
    with shown:
        show_training(shown, Progress(50, 200, 3.21, 750.0, 600.0, (0.4, 0.2)))
    assert out.getvalue() == (
        "training 25%: about 10 min left, held out 1.60 tokens per step, loss 3.210, 750 positions/s\n"
    )
