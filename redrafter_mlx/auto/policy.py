"""`draft="auto"`: draft as much as pays here and now, and nothing where nothing does.

Every node of a draft comes with a path probability, and the machine with a cost table. A step that searches W
beams of length L and verifies the N most probable nodes yields 1 + the sum of their probabilities tokens and takes
draft(W, L) + C(N) seconds. `auto` takes the (W, L, N) of the highest quotient over the last wide searches (the
rule of Sequoia and OPT-Tree, with measured times) and keeps it for some steps. Which nodes the N are is decided
anew in every step, on the device; N itself is not, because the host would have to wait for the search before it
could build the next verification, which costs more than it gains (docs/notes/cpu.md).

The drafter's probabilities are corrected by what is really accepted at each depth, and the table by the times
really taken. Where plain decoding wins, drafting stops, and is tried again after a while that doubles each time.

What is looked up comes with probabilities that the host knows, so N is chosen anew in every step in which something
was found: best-first among those and the mean of the drafter's searches. The drafter has to pay beside the lookup, and
where it does not, the lookup goes on alone, waiting for the text only where it expects to win by that.

Letters: W beam width, L beam length counting the root, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.policy import Outcome, Policy
from redrafter_mlx.tree import MAX_NODES, Beam

from .learned import Learned


class Auto(Policy):
    """The policy: a draft for every step, and a verdict every few steps on which draft pays.

    Args:
        drafter: None where there is none, and drafts are only looked up.
        max_width: greatest beam width that the target verifies; 1 where it verifies chains only.
    """

    def __init__(
        self, learned: Learned, greedy: bool, drafter: Drafter | None, max_width: int = MAX_NODES
    ) -> None:
        self.learned, self.model, self.settings = learned, learned.modes[greedy], learned.settings
        self.shapes: list[tuple[int, int]] = []
        if drafter is None:
            return
        longest = drafter.max_length or max(self.settings.lengths)
        widest = min(drafter.max_width, max_width)
        self.shapes = [
            (w, length)
            for w in self.settings.widths
            for length in self.settings.lengths
            if w <= widest and length <= longest
        ]
        width, length = min(self.settings.wide[0], widest), min(self.settings.wide[1], longest)
        self.wide = Beam(width, length, nodes=min(self.settings.first_nodes, 1 + width * (length - 1)))
        all_right = np.zeros((1, length - 1, width)), np.ones(length - 1)
        if self.model.drafted == 0:
            if self._verdict(*all_right, self.settings.margin) is None:
                self.model.pause = self.settings.longest_pause  # not even if every guess were right
                self._stop()
            self.model.worth = np.zeros(0)  # nothing was searched yet

    def shape(self) -> Beam | None:
        model, settings = self.model, self.settings
        if model.plain_left > 0 or not self.shapes:
            return None
        if model.best is None or len(model.searches) < settings.trial:
            return self.wide
        if model.drafted % settings.search_every == settings.search_every - 1:
            return Beam(self.wide.width, self.wide.length, model.best.nodes)
        return model.best

    @property
    def lookup_shape(self) -> Beam | None:
        return self.settings.lookup

    def awaits(self, probs: Sequence[float]) -> bool:
        verify = self.learned.verify
        _, rate = self._best_rows(np.array(probs), self.learned.table.waiting)
        return rate * verify[1] > self.settings.margin

    def prefers_lookup(self, beam: Beam, probs: Sequence[float]) -> bool:
        return sum(probs) > float(self.model.worth[: (beam.nodes or beam.most_nodes) - 1].sum())

    def rows(self, beam: Beam | None, probs: Sequence[float]) -> int | None:
        if beam is None:
            nodes, _ = self._best_rows(np.array(probs), self.learned.table.waiting)
            return None if nodes == 1 else nodes
        worth = self.model.worth
        seconds = self.learned.table.waiting + self.learned.table.draft_seconds(beam.width, beam.length)
        nodes = max(self._best_rows(np.concatenate([worth, probs]), seconds)[0], beam.nodes or 2)
        is_least = nodes - 2 < worth.size and max(probs) <= worth[nodes - 2]
        return None if is_least else nodes

    def _best_rows(self, probs: np.ndarray, seconds: float) -> tuple[int, float]:
        """The N of most tokens per second for candidates of these path probabilities, and how many those are; 1 where
        a row more does not pay. `seconds` are those of a step beside its verification.
        """
        nodes = [1, *(n for n in self.settings.nodes if n <= probs.size + 1)]
        tokens = 1 + np.concatenate([[0.0], np.sort(probs)[::-1].cumsum()])[np.array(nodes) - 1]
        rates = tokens / (self.learned.verify[nodes] + seconds)
        best = int(rates.argmax())
        return nodes[best], float(rates[best])

    def observe(self, outcome: Outcome) -> None:
        model, settings, beam = self.model, self.settings, outcome.beam
        if outcome.looked_up is not None:
            found = np.zeros(settings.lookup.length - 1)
            found[: len(outcome.looked_up)] = outcome.looked_up[: found.size]
            model.lookups.append(found)
        if beam is None or outcome.candidates is None:
            model.plain_left = max(0, model.plain_left - 1)
            waiting = self.learned.table.waiting if outcome.nodes > 1 else 0.0
            self.learned.note_step(max(1, outcome.nodes), outcome.seconds, waiting)
            return
        assert beam.nodes is not None
        draft_seconds = self.learned.table.draft_seconds(beam.width, beam.length)
        self.learned.note_step(outcome.nodes or beam.nodes, outcome.seconds, draft_seconds)
        # verified with the tree, so there is nothing to wait for; level by level, as a beam search lays it out
        logprobs = np.array(outcome.candidates.logprobs)
        verified = logprobs.argsort()[::-1][: beam.nodes - 1]
        probs = np.bincount(verified // beam.width, np.exp(logprobs[verified]), minlength=beam.length - 1)
        if outcome.num_accepted == outcome.num_tokens:  # how the text goes on is not known
            probs = probs[: outcome.num_accepted]
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
        """The draft of most tokens per second for searches (k, L-1, W), beside what is looked up; None: none beats
        decoding without a draft by `margin`.
        """
        model, lookups = self.model, np.zeros((0, 0))
        if model.lookups:
            lookups = np.stack(model.lookups)[np.arange(len(logprobs)) % len(model.lookups)]
        best, best_rate = None, margin * self._rate_without(lookups)
        for width, length in self.shapes:
            part = logprobs[:, : length - 1, :width]
            worth = (np.exp(part) * trust[: length - 1, None]).reshape(len(part), -1)
            nodes, rate = self._rate(worth, lookups, width, length)
            if rate > best_rate:
                best, best_rate = Beam(width, length, nodes), rate
                model.worth = -np.sort(-worth, axis=1).mean(axis=0)
        return best

    def _rate_without(self, lookups: np.ndarray) -> float:
        """Tokens per second without a draft: plain, or where it pays with what was looked up, (k, D)."""
        plain = 1 / self.learned.verify[1]
        if not lookups.size:
            return float(plain)
        waiting = self.learned.table.waiting
        return float(np.mean([max(plain, self._best_rows(found, waiting)[1]) for found in lookups]))

    def _rate(self, worth: np.ndarray, lookups: np.ndarray, width: int, length: int) -> tuple[int, float]:
        """The best N of a draft by itself for path probabilities (k, P), and its tokens per second beside lookups."""
        verify, draft = self.learned.verify, self.learned.table.draft_seconds(width, length)
        nodes = np.array([n for n in self.settings.nodes if n <= worth.shape[1] + 1])
        tokens = 1 - np.sort(-worth, axis=1).cumsum(axis=1).mean(axis=0)
        # a beam of L tokens can bring no more than L, however sure the drafter is of all its branches
        rates = np.minimum(tokens[nodes - 2], length) / (verify[nodes] + draft)
        best = int(rates.argmax())
        if not lookups.size:
            return int(nodes[best]), float(rates[best])
        both = np.concatenate([worth, lookups], axis=1)
        most = np.array([n for n in self.settings.nodes if n <= both.shape[1] + 1])
        tokens = 1 - np.sort(-both, axis=1).cumsum(axis=1)[:, most - 2]
        tokens = np.minimum(tokens, np.maximum(length, 1 + (lookups > 0).sum(axis=1))[:, None])
        return int(nodes[best]), float((tokens / (verify[most] + draft)).max(axis=1).mean())

    def _stop(self) -> None:
        model = self.model
        self.learned.gave_up = True
        model.plain_left, model.pause = model.pause, min(2 * model.pause, self.settings.longest_pause)
        model.drafted = self.settings.trial - 1  # the next trial is one step long
