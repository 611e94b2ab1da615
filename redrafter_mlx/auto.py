"""`draft="auto"`: draft as much as pays here and now, and nothing where nothing does.

Every node of a draft comes with a path probability, and the machine with a cost table. A step that searches W
beams of length L and verifies the N most probable nodes yields 1 + the sum of their probabilities tokens and takes
draft(W, L) + C(N) seconds. `auto` takes the (W, L, N) of the highest quotient over the last wide searches (the
rule of Sequoia and OPT-Tree, with measured times) and keeps it for some steps. Which nodes the N are is settled
anew in every step, on the device; N itself is not, because the host would have to wait for the search before it
could build the next verification, which costs more than it gains (docs/performance.md).

The drafter's probabilities are corrected by what is really accepted at each depth, and the table by the times
really taken. Where plain decoding wins, drafting stops, and is tried again after a while that doubles each time.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from .cost import CostTable
from .policy import Off
from .tree import Beam, Levels

_log = logging.getLogger("redrafter_mlx")

WIDE = (8, 5)  # the search that shows what narrower and shorter ones would have found
SHAPES = tuple((w, length) for w in (1, 2, 4, 8) for length in (2, 3, 4, 5))
NODES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # few, because a GPU compiles for each
FIRST_NODES = 4  # of the first search, when nothing is known
TRIAL = 3  # drafted steps before the first verdict
REVISE = 12  # steps between later ones
LOOK, LOOKS = 48, 16  # steps between two wide searches, and how many of them are kept
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # plain steps before drafting is tried again
PROBE_EVERY, PROBE = 256, 4  # drafted steps, then a few plain ones, to know what a plain one costs now
MEMORY = 0.99  # what a step's evidence on the drafter's probabilities is worth one step later
PRIOR = 2.0  # accepted nodes per depth that must be seen before the evidence outweighs them
MARGIN = 1.05  # drafting must beat plain decoding by this: the prediction is no better than its table
EARLY_MARGINS = {
    TRIAL: 0.9,
    2 * TRIAL: 1.0,
}  # first verdicts rest on a few steps: only what is hopeless ends there


@dataclass(slots=True)
class Mode:
    """What was learned in greedy decoding, or in sampling: acceptance differs between the two."""

    predicted: np.ndarray = field(default_factory=lambda: np.zeros(WIDE[1] - 1))
    """per depth, decayed sum of predicted probabilities"""
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(WIDE[1] - 1))
    """per depth, decayed count of accepted nodes"""
    wide: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=LOOKS))
    """log-probabilities (L-1, W) of the last wide searches"""
    best: Beam | None = None
    """what pays, once there was a verdict"""
    drafted: int = 0
    """steps since drafting began or began again"""
    plain_left: int = 0
    """plain steps before drafting goes on"""
    pause: int = FIRST_PAUSE

    @property
    def trust(self) -> np.ndarray:
        """(L-1,): how many nodes of a depth are accepted for each one predicted, at most 1.5. Where little was seen,
        what holds for the depth above, without which nothing is accepted here; 1 above the first.
        """
        trust, above = np.empty_like(self.predicted), 1.0
        for depth, (predicted, accepted) in enumerate(zip(self.predicted, self.accepted, strict=True)):
            above = trust[depth] = min((accepted + PRIOR * above) / (predicted + PRIOR), 1.5)
        return trust

    def hear(self, predicted: np.ndarray, num_accepted: int) -> None:
        """Compare what was predicted for the verified nodes of each depth, (depths,), with what came. Depths that
        were not drafted are forgotten too: else a bad run there would keep them from ever being tried again.
        """
        self.predicted *= MEMORY
        self.accepted *= MEMORY
        self.predicted[: predicted.size] += predicted
        self.accepted[:num_accepted] += 1


@dataclass(slots=True)
class Experience:
    """What was learned about a model with its drafter; it outlives a generation."""

    table: CostTable
    verify: np.ndarray = field(init=False)
    """(MAX_NODES + 1,) seconds by rows, corrected by the times taken"""
    modes: dict[bool, Mode] = field(init=False)
    """greedy? -> what was learned there"""
    said_off: bool = False

    def __post_init__(self) -> None:
        self.verify = self.table.verify_seconds()
        self.modes = {True: Mode(), False: Mode()}

    def note_time(self, nodes: int, seconds: float) -> None:
        """Move C(nodes) towards the time taken, and all others half as far: most of a change is the machine's.

        A step more than twice off says nothing about the machine.
        """
        ratio = seconds / self.verify[nodes]
        if 0.5 < ratio < 2:
            self.verify *= 1 + 0.05 * (ratio - 1)
            self.verify[nodes] *= 1 + 0.05 * (ratio - 1)


class Auto(Off):
    """The policy; `observe` hears what each step brought and took."""

    def __init__(self, experience: Experience, greedy: bool, max_width: int) -> None:
        self.known, self.mode = experience, experience.modes[greedy]
        self.shapes = [s for s in SHAPES if s[0] <= max_width]
        width = min(WIDE[0], max_width)
        self.wide = Beam(width, WIDE[1], nodes=min(FIRST_NODES, 1 + width * (WIDE[1] - 1)))
        all_right = np.zeros((1, WIDE[1] - 1, width)), np.ones(WIDE[1] - 1)
        if self.mode.drafted == 0 and self._verdict(*all_right) is None:
            self.mode.pause = LONGEST_PAUSE  # not even if every guess were right
            self._stop()

    def shape(self) -> Beam | None:
        mode = self.mode
        if mode.plain_left > 0:
            return None
        if mode.best is None or len(mode.wide) < TRIAL:
            return self.wide
        if mode.drafted % LOOK == LOOK - 1:
            return Beam(self.wide.width, self.wide.length, mode.best.nodes)
        return mode.best

    def observe(self, beam: Beam | None, levels: Levels | None, num_accepted: int, seconds: float) -> None:
        mode = self.mode
        if beam is None or levels is None:
            mode.plain_left = max(0, mode.plain_left - 1)
            self.known.note_time(1, seconds)
            return
        assert beam.nodes is not None
        self.known.note_time(beam.nodes, seconds - self.known.table.draft_seconds(beam.width, beam.length))
        logprobs = np.array(levels.logprobs)  # verified with the tree, so there is nothing to wait for
        verified = logprobs.reshape(-1).argsort()[::-1][: beam.nodes - 1]
        depth = verified // beam.width
        probs = np.exp(logprobs.reshape(-1)[verified])
        mode.hear(np.bincount(depth, weights=probs, minlength=beam.length - 1), num_accepted)
        if (beam.width, beam.length) == (self.wide.width, self.wide.length):
            mode.wide.append(logprobs)
        mode.drafted += 1
        if mode.drafted in EARLY_MARGINS or mode.drafted % REVISE == 0:
            margin = EARLY_MARGINS.get(mode.drafted, MARGIN)
            mode.best = self._verdict(np.stack(mode.wide), mode.trust, margin)
            if mode.best is None:
                self._stop()
            elif mode.drafted >= 4 * REVISE:
                mode.pause = FIRST_PAUSE
        if mode.drafted % PROBE_EVERY == REVISE:
            mode.plain_left = PROBE

    def _verdict(self, logprobs: np.ndarray, trust: np.ndarray, margin: float = MARGIN) -> Beam | None:
        """The draft of most tokens per second for searches (k, L-1, W); None: none beats plain decoding by
        `margin`.
        """
        verify, best, best_rate = self.known.verify, None, margin / self.known.verify[1]
        for width, length in self.shapes:
            part = logprobs[:, : length - 1, :width]
            order = (-part).reshape(len(part), -1).argsort(axis=1, kind="stable")
            worth = (np.exp(part) * trust[: length - 1, None]).reshape(len(part), -1)
            tokens = 1 + np.take_along_axis(worth, order, axis=1).cumsum(axis=1).mean(axis=0)
            draft = self.known.table.draft_seconds(width, length)
            for nodes in NODES:
                if nodes > tokens.size + 1:
                    break
                # a beam of L tokens can bring no more than L, however sure the drafter is of all its branches
                rate = min(tokens[nodes - 2], length) / (verify[nodes] + draft)
                if rate > best_rate:
                    best, best_rate = Beam(width, length, nodes), rate
        return best

    def _stop(self) -> None:
        mode = self.mode
        if not self.known.said_off:
            self.known.said_off = True
            _log.warning("drafting does not pay here at present: decoding plainly for a while")
        mode.plain_left, mode.pause = mode.pause, min(2 * mode.pause, LONGEST_PAUSE)
        mode.drafted = TRIAL - 1  # the next trial is one step long
