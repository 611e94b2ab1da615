"""`draft="auto"`: draft as much as pays here and now, and nothing where nothing does.

Every node of a draft comes with a path probability, and the machine with a cost table. A step that searches W
beams of length L and verifies the N most probable nodes yields 1 + the sum of their probabilities tokens and takes
draft(W, L) + C(N) seconds. `auto` takes the (W, L, N) of the highest quotient over the last wide searches (the
rule of Sequoia and OPT-Tree, with measured times) and keeps it for some steps. Which nodes the N are is decided
anew in every step, on the device; N itself is not, because the host would have to wait for the search before it
could build the next verification, which costs more than it gains (docs/notes/cpu.md).

The drafter's probabilities are corrected by what is really accepted at each depth, and the table by the times
really taken. Where plain decoding wins, drafting stops, and is tried again after a while that doubles each time.

Letters: W beam width, L beam length counting the root, N nodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.policy import Outcome, Policy
from redrafter_mlx.tree import Beam

from .table import CostTable


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """The constants of the policy."""

    wide: tuple[int, int] = (8, 5)
    """W and L of the search that shows what narrower and shorter ones would have found."""
    widths: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (2, 3, 4, 5)
    nodes: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
    """N that may be chosen; few, because a GPU compiles for each."""
    first_nodes: int = 4
    """N of the first search, when nothing is known."""
    trial: int = 3
    """Drafted steps before the first verdict."""
    revise_every: int = 12
    """Drafted steps between later verdicts."""
    search_every: int = 48
    """Drafted steps between two wide searches."""
    searches_kept: int = 16
    first_pause: int = 32
    """Plain steps before drafting is tried again; doubles each time."""
    longest_pause: int = 1024
    probe_every: int = 256
    """Drafted steps, after which a few plain ones show what a plain one costs now."""
    probe: int = 4
    memory: float = 0.99
    """What a step's evidence on the drafter's probabilities is worth one step later."""
    prior: float = 2.0
    """Accepted nodes per depth that must be seen before the evidence outweighs them."""
    margin: float = 1.05
    """Drafting must beat plain decoding by this: the prediction is no better than its table."""
    first_margins: tuple[float, float] = (0.9, 1.0)
    """The same after one and two trials: these rest on a few steps, so only what is hopeless ends there."""


DEFAULTS = AutoSettings()


@dataclass(slots=True)
class AcceptanceModel:
    """What was learned in greedy decoding, or in sampling: acceptance differs between the two."""

    settings: AutoSettings = DEFAULTS
    predicted: np.ndarray = field(init=False)
    """(L-1,) decayed sum of predicted probabilities, by depth"""
    accepted: np.ndarray = field(init=False)
    """(L-1,) decayed count of accepted nodes, by depth"""
    searches: deque[np.ndarray] = field(init=False)
    """log-probabilities (L-1, W) of the last wide searches"""
    best: Beam | None = None
    """what pays, once there was a verdict"""
    drafted: int = 0
    """steps since drafting began or began again"""
    plain_left: int = 0
    """plain steps before drafting goes on"""
    pause: int = field(init=False)

    def __post_init__(self) -> None:
        depths = self.settings.wide[1] - 1
        self.predicted, self.accepted = np.zeros(depths), np.zeros(depths)
        self.searches = deque(maxlen=self.settings.searches_kept)
        self.pause = self.settings.first_pause

    @property
    def trust(self) -> np.ndarray:
        """(L-1,) calibration: accepted / predicted nodes per depth, capped at 1.5 and shrunk towards the depth above,
        whose acceptance is a precondition.
        """
        trust, above, prior = np.empty_like(self.predicted), 1.0, self.settings.prior
        for depth, (predicted, accepted) in enumerate(zip(self.predicted, self.accepted, strict=True)):
            above = trust[depth] = min((accepted + prior * above) / (predicted + prior), 1.5)
        return trust

    def update(self, predicted: np.ndarray, num_accepted: int) -> None:
        """Compare the probabilities predicted for the verified nodes of each depth, (depths,), with the outcome.
        Depths that were not drafted are forgotten too: else a bad run there would keep them from being tried again.
        """
        self.predicted *= self.settings.memory
        self.accepted *= self.settings.memory
        self.predicted[: predicted.size] += predicted
        self.accepted[:num_accepted] += 1


@dataclass(slots=True)
class Learned:
    """What was learned about a model with its drafter; it outlives a generation."""

    table: CostTable
    settings: AutoSettings = DEFAULTS
    verify: np.ndarray = field(init=False)
    """(MAX_NODES + 1,) seconds by rows, corrected by the times taken"""
    modes: dict[bool, AcceptanceModel] = field(init=False)
    """greedy? -> what was learned there"""
    gave_up: bool = False
    """True once drafting was found not to pay"""

    def __post_init__(self) -> None:
        self.verify = self.table.verify_seconds()
        self.modes = {greedy: AcceptanceModel(self.settings) for greedy in (True, False)}

    def note_time(self, nodes: int, seconds: float) -> None:
        """Move C(nodes) towards the time taken, and all others half as far: most of a change is the machine's.

        A step more than twice off says nothing about the machine.
        """
        ratio = seconds / self.verify[nodes]
        if 0.5 < ratio < 2:
            self.verify *= 1 + 0.05 * (ratio - 1)
            self.verify[nodes] *= 1 + 0.05 * (ratio - 1)


class Auto(Policy):
    """The policy: a draft for every step, and a verdict every few steps on which draft pays."""

    def __init__(self, learned: Learned, greedy: bool, drafter: Drafter) -> None:
        self.learned, self.model, self.settings = learned, learned.modes[greedy], learned.settings
        longest = drafter.max_length or max(self.settings.lengths)
        self.shapes = [
            (w, length)
            for w in self.settings.widths
            for length in self.settings.lengths
            if w <= drafter.max_width and length <= longest
        ]
        width, length = min(self.settings.wide[0], drafter.max_width), min(self.settings.wide[1], longest)
        self.wide = Beam(width, length, nodes=min(self.settings.first_nodes, 1 + width * (length - 1)))
        all_right = np.zeros((1, length - 1, width)), np.ones(length - 1)
        if self.model.drafted == 0 and self._verdict(*all_right, self.settings.margin) is None:
            self.model.pause = self.settings.longest_pause  # not even if every guess were right
            self._stop()

    def shape(self) -> Beam | None:
        model, settings = self.model, self.settings
        if model.plain_left > 0:
            return None
        if model.best is None or len(model.searches) < settings.trial:
            return self.wide
        if model.drafted % settings.search_every == settings.search_every - 1:
            return Beam(self.wide.width, self.wide.length, model.best.nodes)
        return model.best

    def observe(self, outcome: Outcome) -> None:
        model, settings, beam = self.model, self.settings, outcome.beam
        if beam is None or outcome.candidates is None:
            model.plain_left = max(0, model.plain_left - 1)
            self.learned.note_time(1, outcome.seconds)
            return
        assert beam.nodes is not None
        draft_seconds = self.learned.table.draft_seconds(beam.width, beam.length)
        self.learned.note_time(beam.nodes, outcome.seconds - draft_seconds)
        # verified with the tree, so there is nothing to wait for; level by level, as a beam search lays it out
        logprobs = np.array(outcome.candidates.logprobs)
        verified = logprobs.argsort()[::-1][: beam.nodes - 1]
        probs = np.bincount(verified // beam.width, np.exp(logprobs[verified]), minlength=beam.length - 1)
        model.update(probs, outcome.num_accepted)
        if (beam.width, beam.length) == (self.wide.width, self.wide.length):
            model.searches.append(logprobs.reshape(-1, beam.width))
        model.drafted += 1
        trials, rest = divmod(model.drafted, settings.trial)
        first = rest == 0 and trials <= len(settings.first_margins)
        if first or model.drafted % settings.revise_every == 0:
            self._revise(settings.first_margins[trials - 1] if first else settings.margin)
        if model.drafted % settings.probe_every == settings.revise_every:
            model.plain_left = settings.probe

    def _revise(self, margin: float) -> None:
        model = self.model
        model.best = self._verdict(np.stack(model.searches), model.trust, margin)
        if model.best is None:
            self._stop()
        elif model.drafted >= 4 * self.settings.revise_every:
            model.pause = self.settings.first_pause

    def _verdict(self, logprobs: np.ndarray, trust: np.ndarray, margin: float) -> Beam | None:
        """The draft of most tokens per second for searches (k, L-1, W); None: none beats plain decoding by
        `margin`.
        """
        verify, best, best_rate = self.learned.verify, None, margin / self.learned.verify[1]
        for width, length in self.shapes:
            part = logprobs[:, : length - 1, :width]
            order = (-part).reshape(len(part), -1).argsort(axis=1, kind="stable")
            worth = (np.exp(part) * trust[: length - 1, None]).reshape(len(part), -1)
            tokens = 1 + np.take_along_axis(worth, order, axis=1).cumsum(axis=1).mean(axis=0)
            draft = self.learned.table.draft_seconds(width, length)
            for nodes in self.settings.nodes:
                if nodes > tokens.size + 1:
                    break
                # a beam of L tokens can bring no more than L, however sure the drafter is of all its branches
                rate = min(tokens[nodes - 2], length) / (verify[nodes] + draft)
                if rate > best_rate:
                    best, best_rate = Beam(width, length, nodes), rate
        return best

    def _stop(self) -> None:
        model = self.model
        self.learned.gave_up = True
        model.plain_left, model.pause = model.pause, min(2 * model.pause, self.settings.longest_pause)
        model.drafted = self.settings.trial - 1  # the next trial is one step long
