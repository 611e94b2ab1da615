"""How much to draft in the next step.

A policy is asked before a step which beam search to queue (`shape`), when the host knows nothing of it yet, and
hears afterwards what came of it (`observe`). A beam without `nodes` leaves open how many rows are verified: all
nodes of the surviving beams, which is known only when the search is done, so that the host must wait for it.
"""

from __future__ import annotations

from typing import Protocol

from .tree import Beam, Levels


class Policy(Protocol):
    """What the decode loop asks."""

    def shape(self) -> Beam | None:
        """The search to queue for the next step; None: decode the next token plainly."""

    def observe(self, beam: Beam | None, levels: Levels | None, num_accepted: int, seconds: float) -> None:
        """Hear what a step brought and how long the host was in it; `beam` and `levels` None: a plain one."""


class Off:
    """Plain decoding."""

    def shape(self) -> Beam | None:
        return None

    def observe(self, beam: Beam | None, levels: Levels | None, num_accepted: int, seconds: float) -> None:
        pass


class Fixed(Off):
    """The same beam in every step."""

    def __init__(self, beam: Beam) -> None:
        self.beam = beam

    def shape(self) -> Beam | None:
        return self.beam
