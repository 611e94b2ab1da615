"""Where everything but the answer goes: standard error."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from redrafter_mlx.generation import Model


def stderr() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True)


def note(text: str) -> None:
    """Print a remark on stderr, dimmed in a terminal."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)


def note_missing_drafter(model: Model, draft: str, drafter: str | None) -> None:
    """Say that `--draft auto` decodes plainly for want of a drafter, unless `--drafter none` asked for that."""
    if model.drafter is None and draft == "auto" and drafter != "none":
        note(f"{model.target.name} has no drafter, so it decodes plainly: give one with --drafter")


@dataclass(slots=True)
class GaveUpNote:
    """Says after an answer, at most once, that `--draft auto` has found drafting not to pay."""

    model: Model
    is_said: bool = False

    def after_answer(self) -> None:
        learned = self.model.learned
        if learned is not None and learned.gave_up and not self.is_said:
            self.is_said = True
            note("drafting does not pay here at present, so it is paused: redrafter tune shows what it costs")
