"""How much to draft in the next step.

A policy is asked before a step which draft to queue (`shape`), when the host knows nothing of that step yet, and is
told afterwards what came of it (`observe`). A beam without `nodes` leaves open how many rows are verified: all that the
drafter offers, which is known only when the search is done, so that the host must wait for it.

What is looked up in the text costs next to nothing, but only once the host knows the text. Where no draft is queued,
`awaits` says whether the next step is to wait for that instead of being launched ahead; and where something was found,
`rows` says how many rows are verified with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tree import MAX_NODES, Beam, Candidates


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a decode step brought."""

    beam: Beam | None
    """what the drafter was asked for; None where it was not asked"""
    candidates: Candidates | None
    """what it offered; evaluated"""
    num_accepted: int
    """how far the text went along those of its candidates that the beam would have verified"""
    seconds: float
    """that the host spent in the step"""
    nodes: int = 0
    """rows verified; 0: as many as the beam says, or one"""
    num_tokens: int | None = None
    """tokens that the step brought; how the text goes on is not known. None: further than the draft"""
    looked_up: Sequence[float] | None = None
    """path probabilities of what was looked up; None where nothing was"""


class Policy:
    """Decides how much to draft; one instance a text."""

    def shape(self) -> Beam | None:
        """The draft to queue for the next step; None: decode the next token plainly."""
        raise NotImplementedError

    @property
    def lookup_shape(self) -> Beam | None:
        """The most that is to be looked up for a step; None: nothing ever."""
        return None

    def awaits(self, probs: Sequence[float]) -> bool:
        """Whether a step without a draft waits for the text to be known, so that its continuation can be looked up.

        Args:
            probs: path probabilities of what would be looked up now, beyond the tokens that are not known yet.
        """
        return False

    def rows(self, beam: Beam | None, probs: Sequence[float]) -> int | None:
        """Rows to verify, the root counted, where path probabilities `probs` were looked up beside a draft `beam`; None
        where none of them is worth a row, so that merging the two would be in vain.
        """
        raise NotImplementedError

    def prefers_lookup(self, beam: Beam, probs: Sequence[float]) -> bool:
        """Whether a chain that was looked up, of path probabilities `probs`, is verified in place of a draft `beam`.

        Asked where a model verifies chains only, and there are two.
        """
        return sum(probs) >= (beam.length - 1) / 2

    def observe(self, outcome: Outcome) -> None:
        """Record the outcome of a step."""


class Off(Policy):
    """Plain decoding."""

    def shape(self) -> Beam | None:
        return None


class Fixed(Policy):
    """The same beam in every step, for the drafter and for what is looked up."""

    def __init__(self, beam: Beam) -> None:
        self.beam = beam

    def shape(self) -> Beam | None:
        return self.beam

    @property
    def lookup_shape(self) -> Beam | None:
        return self.beam

    def awaits(self, probs: Sequence[float]) -> bool:
        return True

    def rows(self, beam: Beam | None, probs: Sequence[float]) -> int | None:
        most = 1 + len(probs) + (0 if beam is None else beam.most_nodes - 1)
        return min(self.beam.nodes or MAX_NODES, most)
