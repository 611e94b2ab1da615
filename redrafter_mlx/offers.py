"""What is offered for the next step of one text: the drafter's candidates, what is looked up, and both in one tree.

A drafter that needs the context alone is queued before the host looks at the step under way; the lookup, and a drafter
that needs the text, are asked once the host has read it. What came of an offer is told to the policy.

Letters: N nodes, L beam length counting the root, C context size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .drafters.interface import Drafter, RowReader, Rows, Seen, TextDrafter
from .drafters.lookup import Lookup, Offer, TextLookup
from .policy import Outcome, Policy
from .sampling import Sampler
from .target import Target
from .target.cache import KVCache
from .tree import Beam, Candidates, TokenTree, build, chain, merge, num_matching


@dataclass(frozen=True, slots=True)
class _Draft:
    """What the drafter was asked for."""

    beam: Beam
    candidates: Candidates
    noise: mx.array | None
    """(L, V) Gumbel noise of the positions after the root"""
    num_offered: mx.array | None
    """() int32: rows to verify but the root; None where that was decided beforehand"""


@dataclass(frozen=True, slots=True)
class _Step:
    """What the tree under way was built from."""

    draft: _Draft | None = None
    offer: Offer | None = None
    """None too where what was looked up was not worth a row"""
    candidates: Candidates | None = None
    """both, merged"""
    looked_up: tuple[float, ...] = ()
    """path probabilities of what was looked up, also where it is not offered"""


class Offers:
    """Drafter and lookup at work on one text, and what they offer.

    Args:
        drafter: None drafts nothing but what is looked up, whatever the policy says.
        cache: the text's; a drafter that reads all committed rows goes on where it left off with it.
        lookup: None looks nothing up.
    """

    def __init__(  # noqa: PLR0913  (what a text consists of)
        self,
        target: Target,
        drafter: Drafter | None,
        cache: KVCache,
        policy: Policy,
        sampler: Sampler,
        prompt: Sequence[int],
        lookup: Lookup | None,
    ) -> None:
        self._cache, self._policy, self._sampler = cache, policy, sampler
        self._branches = target.branches
        self._drafter = None if drafter is None else begin_text(drafter, cache, prompt)
        self._reader = cast(RowReader, self._drafter) if drafter is not None and drafter.needs_rows else None
        self._source = "" if drafter is None else drafter.source
        self._drafts_late = drafter is not None and drafter.needs_text
        self._lookup: TextLookup | None = None
        if lookup is not None and policy.lookup_shape is not None:
            self._lookup = lookup.start(prompt, sampler.sampling.is_greedy)
        self._beam: Beam | None = None  # of the next step's draft
        self._draft: _Draft | None = None  # that draft, once it is queued
        self._waits = False  # True: nothing is queued, and the next step waits for the text
        self._step = _Step()
        self.noise: mx.array | None = None
        """(L, V) of the positions after the root of the step under way; None when greedy"""

    @property
    def awaits_text(self) -> bool:
        """True where the next step is not plain for certain, so that it cannot be launched ahead."""
        return self._beam is not None or self._waits

    @property
    def output(self) -> list[mx.array]:
        """What to evaluate to have the queued draft computed."""
        return [] if self._draft is None else [self._draft.candidates.tokens, self._draft.candidates.logprobs]

    @property
    def num_offered(self) -> mx.array | None:
        """() int32: what the host must know of the queued draft before it can build the next tree; None: nothing."""
        return None if self._draft is None else self._draft.num_offered

    def show(self, rows: Rows) -> None:
        """Show committed rows to a drafter that reads all of them."""
        if self._reader is not None:
            self._reader.observe(rows)

    @property
    def reads_rows(self) -> bool:
        """True where `show` is listened to."""
        return self._reader is not None

    def queue(self, seen: Seen, low: int, slack: int, unread: int) -> None:
        """Queue the draft of what follows the root, which stands at `seen.position`, low ... low + slack.

        Without one, decide whether the next step waits for the text, of which the host lacks `unread` plain tokens.
        """
        self._draft, self._waits = None, False
        self._beam = None if self._drafter is None else self._policy.shape()
        if self._beam is not None:
            if not self._drafts_late:
                self._draft = self._drafted(self._beam, seen, low, slack)
        elif self._lookup is not None:
            ahead = self._looked_up() if unread else None
            self._waits = not unread or self._policy.awaits([] if ahead is None else ahead.probs[unread:])

    def _drafted(self, beam: Beam, seen: Seen, low: int, slack: int) -> _Draft:
        assert self._drafter is not None and seen.position is not None
        ahead = seen.position + mx.arange(1, beam.length + 1, dtype=mx.int32)
        noise = self._sampler.noise(ahead, low, slack + beam.length + 1)
        shared = None if noise is None else noise[:-1] * self._sampler.sampling.temperature
        candidates = self._drafter.draft(Seen(seen.context, seen.root, shared, seen.position), beam)
        is_open = beam.nodes is None and not candidates.is_chain
        return _Draft(beam, candidates, noise, candidates.num_offered() if is_open else None)

    def _looked_up(self) -> Offer | None:
        """What the text as the host knows it is likely to go on with, having stood in it before."""
        shape = self._policy.lookup_shape
        offer = None if self._lookup is None or shape is None else self._lookup.offer(shape)
        return offer if offer is None or self._branches else offer.best_path()

    def tree(self, context: mx.array, root: mx.array) -> TokenTree:
        """The nodes to verify in this step: the best of what was drafted and looked up, or the root alone."""
        position, draft = self._cache.length, self._draft
        if self._beam is not None and self._drafts_late:
            seen = Seen(context, root, None, mx.array(position, dtype=mx.int32))
            draft = self._drafted(self._beam, seen, position, 0)
        self._draft = None
        self._step, nodes = self._merged(draft, self._looked_up() if self.awaits_text else None)
        if self._step.candidates is None or nodes == 1:
            return chain(root.reshape(1))
        tree = build(self._step.candidates, root, nodes)
        self.noise = self._noise_of(self._step.draft, tree.height)
        return tree

    def _merged(self, draft: _Draft | None, offer: Offer | None) -> tuple[_Step, int]:
        """What to build the tree from, and how many rows to verify."""
        probs = () if offer is None else tuple(offer.probs)
        if offer is not None and draft is not None and not self._branches:  # one chain, not a tree of two
            if self._policy.prefers_lookup(draft.beam, probs):
                draft = None
            else:
                offer = None
        nodes = None if offer is None else self._policy.rows(None if draft is None else draft.beam, probs)
        if offer is not None and nodes is not None:
            looked_up = offer.candidates(to_merge=draft is not None)
            if draft is None:
                return _Step(None, offer, looked_up, probs), min(nodes, 1 + looked_up.num_candidates)
            return _Step(draft, offer, merge(looked_up, draft.candidates), probs), max(2, nodes)
        if draft is None:
            return _Step(looked_up=probs), 1
        most = draft.candidates.num_candidates + 1
        nodes = min(draft.beam.nodes or most, most)
        if draft.num_offered is not None:  # known since the last synchronization
            nodes = 1 + cast(int, draft.num_offered.item())
        return _Step(draft, None, draft.candidates, probs), nodes

    def _noise_of(self, draft: _Draft | None, height: int) -> mx.array | None:
        """Noise (height + 1, V) of the positions after the root; what a queued draft shares is not made again."""
        shared = None if draft is None else draft.noise
        have = 0 if shared is None else shared.shape[0]
        if height + 1 <= have:
            return shared
        first = self._cache.length + 1
        more = self._sampler.noise(first + mx.arange(have, height + 1, dtype=mx.int32), first, height + 1)
        return more if shared is None or more is None else mx.concatenate([shared, more])

    def outcome(self, tokens: list[int], nodes: int, seconds: float) -> Outcome:
        """What a step that verified `nodes` rows and brought `tokens` says about drafter and lookup."""
        draft, looked_up = self._step.draft, None if self._lookup is None else self._step.looked_up
        if draft is None:
            return Outcome(None, None, 0, seconds, nodes, len(tokens), looked_up)
        num_accepted = len(tokens) - 1
        if self._step.offer is not None:
            num_accepted = draft.candidates.num_matching(tokens, draft.beam.nodes)
        return Outcome(draft.beam, draft.candidates, num_accepted, seconds, nodes, len(tokens), looked_up)

    def sources(self, tokens: list[int]) -> list[str]:
        """What drafted each of the accepted tokens, all but the last of what a step brought."""
        found, offer = [self._source] * (len(tokens) - 1), self._step.offer
        if offer is not None:
            count = num_matching(offer.tokens, offer.parents, tokens[:-1])
            found[:count] = [Lookup.source] * count
        return found

    def rows(self, nodes: int) -> dict[str, int]:
        """The verified rows but the root, by what drafted them; what both have is the lookup's."""
        step, rows = self._step, nodes - 1
        if step.offer is None or step.candidates is None:
            return {self._source: rows}
        if step.draft is None:
            return {Lookup.source: rows}
        size = step.candidates.num_candidates - step.draft.candidates.num_candidates
        looked_up = int((step.candidates.best(nodes) < size).sum())
        return {Lookup.source: looked_up, self._source: rows - looked_up}

    @property
    def learns_phrases(self) -> bool:
        """True where `learn` is listened to."""
        return self._lookup is not None

    def learn(self, phrase: Sequence[int]) -> None:
        """Keep what the target chose on the way on from a rejected row."""
        if self._lookup is not None:
            self._lookup.learn(phrase)

    def keep(self, tokens: list[int]) -> None:
        """Let drafter and lookup know what was committed."""
        for each in (self._drafter, self._lookup):
            if each is not None:
                each.keep(tokens)


def begin_text(drafter: Drafter, cache: KVCache, prompt: Sequence[int]) -> TextDrafter:
    """The drafter at work on a text. One that reads all committed rows goes on where it left off with this cache."""
    if not drafter.needs_rows:
        return drafter.start(prompt)
    reader = _reader(drafter, cache)
    if reader is None:
        reader = cast(RowReader, drafter.start(prompt))
        cache.followers.append(reader)
    return reader


def rows_shown(drafter: Drafter | None, cache: KVCache) -> int:
    """Positions of `cache` from which a text with this drafter can go on: those whose rows it has been shown, if it
    reads them. What follows them must be processed again.
    """
    if drafter is None or not drafter.needs_rows:
        return cache.length
    reader = _reader(drafter, cache)
    return 0 if reader is None else min(reader.shown, cache.length)


def _reader(drafter: Drafter, cache: KVCache) -> RowReader | None:
    readers = (each for each in cache.followers if getattr(each, "drafter", None) is drafter)
    return cast("RowReader | None", next(readers, None))
