"""What `auto` has learned of a model with its drafter, by which it decides: acceptance, searches, seconds.

Letters: W beam width, L beam length counting the root, N nodes, P candidates.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

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
    lookup: Beam = Beam(1, 17)
    """the most that is looked up for a step"""
    lookups_kept: int = 16
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
    ratios_kept: int = 32
    """Steps whose seconds are held against the table."""
    ratios_needed: int = 8
    """Plain and drafted steps that must have been seen before the table is judged."""
    stale: float = 1.3
    """Drafted steps this much slower or faster than the table says, beside plain ones: it is measured again."""
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
    lookups: deque[np.ndarray] = field(init=False)
    """path probabilities (lookup.length - 1,) of what was looked up in the last steps, 0 where there was nothing"""
    best: Beam | None = None
    """what pays, once there was a verdict"""
    worth: np.ndarray = field(init=False)
    """(P,) mean path probability of the most probable, second, ... candidate of that draft"""
    drafted: int = 0
    """steps since drafting began or began again"""
    plain_left: int = 0
    """plain steps before drafting goes on"""
    pause: int = field(init=False)

    def __post_init__(self) -> None:
        depths = self.settings.wide[1] - 1
        self.predicted, self.accepted = np.zeros(depths), np.zeros(depths)
        self.searches = deque(maxlen=self.settings.searches_kept)
        self.lookups = deque(maxlen=self.settings.lookups_kept)
        self.worth = np.zeros(0)
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
    is_second: bool = False
    """True where this table was measured because steps had contradicted the one before; once in a process is enough"""
    gave_up: bool = False
    """True once drafting was found not to pay"""
    plain_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=DEFAULTS.ratios_kept))
    """seconds of the last plain steps over those of the table"""
    drafted_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=DEFAULTS.ratios_kept))
    """the same of drafted steps"""

    def __post_init__(self) -> None:
        self.verify = self.table.verify_seconds()
        self.modes = {greedy: AcceptanceModel(self.settings) for greedy in (True, False)}

    @property
    def is_stale(self) -> bool:
        """True where steps take times so different from the table's that it must have been measured in a busy minute:
        drafted ones against plain ones, since a machine that is slower for both changes nothing.
        """
        few = min(len(self.plain_ratios), len(self.drafted_ratios)) < DEFAULTS.ratios_needed
        if few:
            return False
        ratio = float(np.median(self.drafted_ratios) / np.median(self.plain_ratios))
        return not 1 / DEFAULTS.stale < ratio < DEFAULTS.stale

    def note_step(self, nodes: int, seconds: float, beside: float) -> None:
        """Compare a whole step with the table: `beside` are the seconds of the table for all but the verification."""
        known = self.table.verify_seconds()[nodes] + beside
        (self.plain_ratios if nodes == 1 else self.drafted_ratios).append(seconds / known)
        self.note_time(nodes, seconds - beside)

    def note_time(self, nodes: int, seconds: float) -> None:
        """Move C(nodes) towards the time taken, and all others half as far: most of a change is the machine's.

        A step more than twice off says nothing about the machine.
        """
        ratio = seconds / self.verify[nodes]
        if 0.5 < ratio < 2:
            self.verify *= 1 + 0.05 * (ratio - 1)
            self.verify[nodes] *= 1 + 0.05 * (ratio - 1)
