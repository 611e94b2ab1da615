"""Where everything but the answer goes, and tables that keep their figures whole in any width."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from redrafter_mlx.generation import Model
    from redrafter_mlx.stats import Stats

NEVER_ACCEPTED = 48
"""Drafted tokens of which none was accepted, after which that is said: a drafter for the model gets some by then."""


def stderr() -> Console:
    """A rich console on stderr."""
    return _console(is_stderr=True)


def stdout() -> Console:
    """A rich console on stdout."""
    return _console(is_stderr=False)


def _console(is_stderr: bool) -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  (rich calls it while the error is handled, and would exit with 1)

    return Plain(stderr=is_stderr)


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left and the others to the right.

    Where it is wider than the terminal, every row becomes lines of a name and a figure, and no figure is cut.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    lines = [header, *rows]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(header))]
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        table = Table(title=title or None)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    if title:
        console.print(Text(title))
    for first, *figures in rows:
        console.print(Text(" ".join((header[0], first)).strip()))
        for name, figure in zip(header[1:], figures, strict=True):
            console.print(Text(f" {name} {figure}"), soft_wrap=cell_len(figure) > console.width)


def columns() -> int:
    """The terminal's width at present; 80 where there is none."""
    for stream in (sys.stdout, sys.stderr):
        try:
            return os.get_terminal_size(stream.fileno()).columns or 80
        except (AttributeError, OSError, ValueError):
            continue
    return 80


def visible(text: str) -> str:
    """The text without control characters, by which a model could move the cursor or worse; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def write_answer(text: str) -> None:
    """Print a piece of an answer at once: as it is into a file or pipe, what is visible of it in a terminal."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def note(text: str) -> None:
    """Print a remark on stderr; in a terminal it is dimmed and broken between words."""
    if sys.stderr.isatty():
        width = max(10, columns() - 1)
        lines = [
            textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)
            for line in text.splitlines()
        ]
        text = "\n".join("\n".join(each) for each in lines)
    dim, plain = (
        ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    )
    print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)


def note_missing_drafter(model: Model, draft: str, drafter: str | None) -> None:
    """Say what `--draft auto` does for want of a drafter, unless `--drafter` asked for that."""
    if model.drafter is not None or draft != "auto" or drafter in ("none", "lookup"):
        return
    if model.lookup is None:
        note(f"{model.target.name} has no drafter, so it decodes plainly: give one with --drafter")
    else:
        note(
            f"{model.target.name} has no drafter, so only what has stood in the text before is drafted: "
            "redrafter train makes one"
        )


@dataclass(slots=True)
class DrafterNotes:
    """Says after an answer, each at most once, that drafting was found not to pay, or that nothing is ever accepted."""

    model: Model
    said: set[str] = field(default_factory=set)
    drafted: int = 0
    """tokens that the drafter has drafted so far"""
    accepted: int = 0

    def after_answer(self, stats: Stats | None) -> None:
        """Look at what came of an answer; None where there was none."""
        learned, drafter = self.model.learned, self.model.drafter
        if stats is not None and drafter is not None:
            self.drafted += stats.drafted_by_source.get(drafter.source, 0)
            self.accepted += stats.accepted_by_source.get(drafter.source, 0)
        if drafter is not None and self.drafted >= NEVER_ACCEPTED and self.accepted == 0:
            self._say(
                f"none of {self.drafted} tokens that the drafter drafted was accepted: was it made for this model? "
                "redrafter-convert verify finds out",
                "never accepted",
            )
        elif learned is not None and learned.gave_up:
            self._say(
                "the drafter does not pay here at present, so it is paused: redrafter tune shows what it costs",
                "gave up",
            )

    def _say(self, text: str, name: str) -> None:
        if name not in self.said:
            self.said.add(name)
            note(text)
