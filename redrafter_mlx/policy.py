"""How much to draft in the next step.

A policy is asked twice per step: which beam search to queue (`shape`), before the host knows
anything, and how many of its nodes to verify (`nodes`), after the step's one synchronisation.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from .tree import Beam, Levels, survivors


class Policy(Protocol):
    """What the decode loop asks."""

    def shape(self) -> Beam | None:
        """The search to queue for the next step; None: decode the next token plainly."""

    def summary(self, levels: Levels) -> mx.array | None:
        """What `nodes` wants to know of a queued search, read in the step's one synchronisation."""

    def nodes(self, beam: Beam, summary: list[float]) -> int:
        """Rows to verify, root included."""

    def observe(self, beam: Beam | None, nodes: int, num_accepted: int, seconds: float) -> None:
        """Hear what a step brought (`beam`: None for a plain one) and how long the host was in
        it.
        """


class Off:
    """Plain decoding."""

    def shape(self) -> Beam | None:
        return None

    def summary(self, levels: Levels) -> mx.array | None:
        return None

    def nodes(self, beam: Beam, summary: list[float]) -> int:
        return 1

    def observe(self, beam: Beam | None, nodes: int, num_accepted: int, seconds: float) -> None:
        pass


class Fixed(Off):
    """The same beam in every step."""

    def __init__(self, beam: Beam) -> None:
        self.beam = beam

    def shape(self) -> Beam | None:
        return self.beam

    def summary(self, levels: Levels) -> mx.array | None:
        if self.beam.width == 1 or self.beam.nodes is not None:
            return None  # the shape is known without looking
        return survivors(levels).astype(mx.float32).sum().reshape(1)

    def nodes(self, beam: Beam, summary: list[float]) -> int:
        if beam.nodes is not None:
            return beam.nodes
        return 1 + int(summary[0]) if summary else beam.length
