"""How much to draft in the next step.

A policy is asked before a step which draft to queue (`shape`), when the host knows nothing of that step yet, and is
told afterwards what came of it (`observe`). A beam without `nodes` leaves open how many rows are verified: all that the
drafter offers, which is known only when the search is done, so that the host must wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Beam, Candidates


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a decode step brought."""

    beam: Beam | None
    """what was drafted; None in a plain step"""
    candidates: Candidates | None
    """what the drafter offered; evaluated"""
    num_accepted: int
    seconds: float
    """that the host spent in the step"""


class Policy:
    """Decides how much to draft; one instance a text."""

    def shape(self) -> Beam | None:
        """The draft to queue for the next step; None: decode the next token plainly."""
        raise NotImplementedError

    def observe(self, outcome: Outcome) -> None:
        """Record the outcome of a step."""


class Off(Policy):
    """Plain decoding."""

    def shape(self) -> Beam | None:
        return None


class Fixed(Policy):
    """The same beam in every step."""

    def __init__(self, beam: Beam) -> None:
        self.beam = beam

    def shape(self) -> Beam | None:
        return self.beam
