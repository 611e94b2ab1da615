"""`draft="auto"`: draft as much as pays here and now, and nothing where nothing does.

Every node of a draft comes with a path probability, and the machine with a cost table. A step of n
nodes yields 1 + sum of their probabilities tokens and takes draft + C(n) seconds; both choices
below maximise the quotient (reference: Sequoia's and OPT-Tree's rule, with measured times):

    nodes   how many of the searched nodes to verify: the best n of the step at hand
    shape   how wide and deep to search next: the best (W, L) over the last searches

The drafter's probabilities are corrected by what is really accepted at each depth, and the table by
the times really taken. Where plain decoding wins, drafting stops, and is tried again after a while
that doubles each time.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .cost import CostTable
from .policy import Off
from .tree import Beam, Levels

_log = logging.getLogger("redrafter_mlx")

WIDE = (8, 5)  # the search that shows what narrower and shorter ones would have found
SHAPES = tuple((w, length) for w in (1, 2, 4, 8) for length in (2, 3, 4, 5))
LOOK = 24  # steps between two wide searches
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # plain steps before drafting is tried again
TRIAL = 6  # drafted steps before the first verdict
MARGIN = 1.08  # drafting must beat plain decoding by this: the prediction is no better than its table


@dataclass(slots=True)
class Experience:
    """What was learned about a model with its drafter; it outlives a generation."""

    table: CostTable
    verify: np.ndarray = field(init=False)
    """(MAX_NODES + 1,) seconds by rows, corrected by the times taken"""
    predicted: dict[bool, np.ndarray] = field(init=False)
    """greedy? -> per depth, decayed sum of predicted probabilities"""
    accepted: dict[bool, np.ndarray] = field(init=False)
    """greedy? -> per depth, decayed count of accepted nodes"""
    wide: dict[bool, deque[np.ndarray]] = field(init=False)
    """greedy? -> log-probabilities (L-1, W) of the last wide searches"""
    pause: int = FIRST_PAUSE
    said_off: bool = False

    def __post_init__(self) -> None:
        self.verify = self.table.verify_seconds()
        depths = WIDE[1] - 1
        self.predicted = {g: np.full(depths, 2.0) for g in (True, False)}
        self.accepted = {g: np.full(depths, 2.0) for g in (True, False)}
        self.wide = {g: deque(maxlen=8) for g in (True, False)}

    def trust(self, greedy: bool) -> np.ndarray:
        """(L-1,): how many nodes of a depth are accepted for each one predicted, at most 1.5."""
        return np.minimum(self.accepted[greedy] / self.predicted[greedy], 1.5)


class Auto(Off):
    """The policy; `observe` hears the seconds of each step."""

    def __init__(self, experience: Experience, greedy: bool, max_width: int) -> None:
        self.experience, self.greedy = experience, greedy
        self.wide = (min(WIDE[0], max_width), WIDE[1])
        self.shapes = [s for s in SHAPES if s[0] <= self.wide[0]]
        self.best: tuple[int, int] | None = self.wide
        self.plain_left = 0
        self.drafted = 0  # steps since drafting began or began again
        self.expected = np.zeros(0)  # per depth, of the nodes being verified

    def shape(self) -> Beam | None:
        if self.plain_left > 0:
            return None
        look = len(self.experience.wide[self.greedy]) < 3 or self.drafted % LOOK == LOOK - 1
        shape = self.wide if look or self.best is None else self.best
        return Beam(*shape, nodes=self._cap(shape))

    def _cap(self, shape: tuple[int, int]) -> int:
        return min(1 + shape[0] * (shape[1] - 1), 32)

    def summary(self, levels: Levels) -> mx.array | None:
        return levels.logprobs.reshape(-1)

    def nodes(self, beam: Beam, summary: list[float]) -> int:
        logprobs = np.array(summary).reshape(beam.length - 1, beam.width)
        if (beam.width, beam.length) == self.wide:
            self.experience.wide[self.greedy].append(logprobs)
        draft = self.experience.table.draft_seconds(beam.width, beam.length)
        count, _, chosen = self._best_nodes(logprobs, draft)
        self.expected = chosen
        return count

    def _best_nodes(self, logprobs: np.ndarray, draft: float) -> tuple[int, float, np.ndarray]:
        """Nodes to verify (root included), tokens per second then, and expected accepted per
        depth.
        """
        depths = logprobs.shape[0]
        probs = np.exp(logprobs)
        trusted = probs * self.experience.trust(self.greedy)[:depths, None]
        order = np.argsort(-(logprobs - 1e-4 * np.arange(depths)[:, None]).reshape(-1), kind="stable")
        order = order[: self._cap((logprobs.shape[1], depths + 1)) - 1]
        tokens = 1 + np.concatenate([[0.0], np.cumsum(trusted.reshape(-1)[order])])
        rate = tokens / (self.experience.verify[1 : tokens.size + 1] + draft)
        extra = int(rate.argmax())
        kept = order[:extra]
        expected = np.bincount(kept // logprobs.shape[1], weights=probs.reshape(-1)[kept], minlength=depths)
        return extra + 1, float(rate[extra]), expected

    def _best_shape(self) -> tuple[int, int] | None:
        """The (W, L) of highest expected tokens per second over the last wide searches; None: plain
        decoding.
        """
        best, best_rate = None, MARGIN / self.experience.verify[1]
        for width, length in self.shapes:
            draft = self.experience.table.draft_seconds(width, length)
            rates = [
                self._best_nodes(logprobs[: length - 1, :width], draft)[1]
                for logprobs in self.experience.wide[self.greedy]
            ]
            rate = len(rates) / sum(1 / r for r in rates)  # times add up, so the harmonic mean
            if rate > best_rate:
                best, best_rate = (width, length), rate
        return best

    def observe(self, beam: Beam | None, nodes: int, num_accepted: int, seconds: float) -> None:
        known = self.experience
        if beam is None:
            self.plain_left = max(0, self.plain_left - 1)
            self._note_time(1, seconds)
            return
        self._note_time(nodes, seconds - known.table.draft_seconds(beam.width, beam.length))
        depths = self.expected.size
        for sums in (known.predicted, known.accepted):
            sums[self.greedy][:depths] *= 0.97
        known.predicted[self.greedy][:depths] += self.expected
        known.accepted[self.greedy][: min(num_accepted, depths)] += 1
        self.drafted += 1
        if self.drafted == TRIAL or self.drafted % (2 * TRIAL) == 0:
            self.best = self._best_shape()
            if self.best is None:
                self._pause()
            elif self.drafted >= 4 * TRIAL:
                known.pause = FIRST_PAUSE

    def _pause(self) -> None:
        known = self.experience
        if not known.said_off:
            known.said_off = True
            _log.warning("drafting does not pay here at present: decoding plainly for a while")
        self.plain_left, known.pause = known.pause, min(2 * known.pause, LONGEST_PAUSE)
        self.drafted = TRIAL - 1  # the next trial is one step long

    def _note_time(self, nodes: int, seconds: float) -> None:
        """Move C(nodes) towards the time taken; a step more than twice off says nothing about the
        machine.
        """
        old = self.experience.verify[nodes]
        if 0.5 * old < seconds < 2 * old:
            self.experience.verify[nodes] = old + 0.1 * (seconds - old)
