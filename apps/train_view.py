"""What `redrafter train` shows while it works: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from .console import stderr

if TYPE_CHECKING:
    from redrafter_mlx.train.settings import Progress
    from redrafter_mlx.train.tally import Tally

LINE_SECONDS = 30.0
"""Between two lines of a log about the same phase."""


def duration(seconds: float) -> str:
    """A time as people say it: "under a minute", "about 12 min", "about 3 h 10 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    if minutes < 90:
        return f"about {minutes} min"
    hours, rest = divmod(5 * round(minutes / 5), 60)
    return f"about {hours} h {rest} min" if rest else f"about {hours} h"


class View:
    """Shows one phase after another. Use it as a context manager."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self.console = stderr()
        self._bars: Bars | None = None
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=14),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
                console=self.console,
                expand=True,
            )
        self._task: int | None = None
        self._phase, self._printed, self._last = "", 0.0, ""

    def __enter__(self) -> View:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_line()
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a remark."""
        self._finish_line()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, phase: str, share: float, note: str) -> None:
        """Show how far a phase is.

        Args:
            share: of the phase that is done, 0 to 1.
        """
        if self._bars is not None:
            if phase != self._phase:
                self._task = self._bars.add_task(phase, total=1.0, note="")
            assert self._task is not None
            self._bars.update(self._task, completed=min(1.0, share), note=note)  # type: ignore[arg-type]
            self._phase = phase
            return
        line = f"{phase} {min(1.0, share):.0%}: {note}"
        now = time.monotonic()
        if phase != self._phase:
            self._finish_line()
        elif now - self._printed < LINE_SECONDS:
            self._last = line
            return
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._phase, self._printed, self._last = phase, now, ""

    def _finish_line(self) -> None:
        """In a log, print where the last phase ended."""
        if self._bars is None and self._last:
            self.console.print(self._last, markup=False, highlight=False, soft_wrap=True)
            self._last = ""


class WritingView:
    """Shows the writing of text from its tally."""

    def __init__(self, view: View, left: Callable[[Tally], float] | None = None) -> None:
        """`left`: seconds of writing that are left, where time decides how much is written."""
        self._view, self._left, self._begun = view, left, time.monotonic()

    def on_step(self, tally: Tally) -> None:
        """Show the tally."""
        elapsed = max(time.monotonic() - self._begun, 1e-3)
        speed = tally.tokens / elapsed
        if self._left is None:
            to_write = tally.tokens_left
            share = tally.tokens / max(1.0, tally.tokens + to_write)
            left = duration(to_write / speed) + " left" if tally.tokens else "starting"
        else:
            seconds = max(0.0, self._left(tally))
            share = elapsed / (elapsed + seconds)
            left = duration(seconds) + " left"
        what = {"questions": "questions", "answers": "answers", "states": "answers read"}[tally.phase]
        of_batch = f", {what} {tally.batch_ended}/{tally.batch_size}" if tally.batch_size else ""
        asking = tally.phase == "questions" and not tally.saved_answers
        tokens = f"{tally.question_tokens:,} tokens" if asking else f"{tally.positions:,} tokens to train on"
        note = f"{left}{of_batch}, {tokens}, {speed:.0f}/s"
        self._view.show("writing", share, note)


def show_training(view: View, progress: Progress) -> None:
    """Show a training step."""
    note = (
        f"{duration(progress.seconds_left)} left, held out {progress.tokens_per_step:.2f} tokens per step, "
        f"loss {progress.loss:.3f}, {progress.positions_per_second:.0f} positions/s"
    )
    view.show("training", progress.step / max(1, progress.steps), note)
