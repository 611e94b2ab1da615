"""Drafts that need no weights: what followed the last tokens where they stood before, in the prompt or the answer.

People's answers repeat their prompts and themselves. The longest earlier match of the text's end is continued as it
was continued then (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding; SuffixDecoding,
arXiv 2411.04975). What such a guess is worth is measured, not assumed: at every token of a text it is noted whether the
match at hand foretold it, by the length of the match. A guess that follows `d` others continues a match that is `d`
tokens longer, so the probability of a path is a product of these shares, and long matches grow by themselves.

Letters: W beam width, L beam length counting the root, P candidates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from redrafter_mlx.tree import NEVER, Beam, Candidates

from .history import History
from .suffixes import LONGEST, Match, SuffixIndex

SIZES = (4, 8, 16, 32, 64)
"""An offer is filled up to one of these, so that a GPU compiles for few shapes."""
LEAST_PROB = 0.02
"""Paths less probable than this are not followed further."""
MOST_PHRASES = 4096
"""Phrases kept of a text's rejected rows, the oldest going first."""

# Shares of right guesses by match length 1, 2, ..., measured on the default model's answers to MT-bench (greedy, and
# at T = 1); they begin every model's figures with the weight of a few observations.
_PRIOR_GREEDY = (
    0.22,
    0.52,
    0.63,
    0.71,
    0.79,
    0.81,
    0.86,
    0.87,
    0.87,
    0.87,
    0.87,
    0.88,
    0.9,
    0.92,
    0.94,
    0.98,
)
_PRIOR_SAMPLING = (0.11, 0.3, 0.38, 0.48, 0.5, 0.54, 0.61, 0.65, 0.68, 0.7, 0.72, 0.74, 0.76, 0.78, 0.8, 0.85)
_PRIOR_WEIGHT = 4.0
_PRIOR_PHRASE = 0.2
_MEMORY = 0.995
"""What an observation is worth after the next one of the same kind."""


@dataclass(slots=True)
class HitRates:
    """How often a guess was right, by the length of the match it continues; learned while decoding."""

    prior: Sequence[float]
    """share of right guesses by match length 1, 2, ... before anything was seen"""
    right: list[float] = field(init=False)
    """decayed count of right guesses, by match length"""
    seen: list[float] = field(init=False)
    """decayed count of guesses"""

    def __post_init__(self) -> None:
        self.right = [_PRIOR_WEIGHT * share for share in self.prior]
        self.seen = [_PRIOR_WEIGHT] * len(self.prior)

    def share(self, length: int) -> float:
        """Probability that the continuation of a match of this length is right."""
        index = min(length, len(self.seen)) - 1
        return self.right[index] / self.seen[index]

    def observe(self, length: int, is_right: bool) -> None:
        """Count one guess."""
        index = min(length, len(self.seen)) - 1
        self.right[index] = self.right[index] * _MEMORY + is_right
        self.seen[index] = self.seen[index] * _MEMORY + 1


@dataclass(frozen=True, slots=True)
class Offer:
    """What was looked up, known to the host: P nodes below the root, parents before children."""

    tokens: list[int]
    parents: list[int]
    """index of a candidate; -1 for the root"""
    probs: list[float]
    """of the path from the root"""
    height: int

    def best_path(self) -> Offer:
        """Of all candidates the most probable child of the root, its most probable child, and so on."""
        path: list[int] = []
        while children := [
            n for n, parent in enumerate(self.parents) if parent == (path[-1] if path else -1)
        ]:
            path.append(max(children, key=self.probs.__getitem__))
        probs = [self.probs[node] for node in path]
        return Offer([self.tokens[node] for node in path], list(range(-1, len(path) - 1)), probs, len(path))

    def candidates(self, to_merge: bool = False) -> Candidates:
        """The same on the device, filled up with candidates that are not offered but for a chain by itself, which is
        cut to the rows that are verified, whatever its length.
        """
        count = len(self.tokens)
        last = count - 1
        is_chain = not to_merge and all(parent == index - 1 for index, parent in enumerate(self.parents))
        fill = 0 if is_chain else next(size for size in SIZES if size >= count) - count
        probs = mx.log(mx.array(self.probs, dtype=mx.float32))
        return Candidates(
            mx.array(self.tokens + [0] * fill, dtype=mx.int32),
            mx.array(self.parents + [last] * fill, dtype=mx.int32),
            mx.concatenate([probs, mx.full((fill,), NEVER)]) if fill else probs,
            self.height,
            is_chain,
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured in greedy decoding, or in sampling: acceptance differs between the two."""

    text: HitRates
    """of matches in the text itself"""
    history: HitRates
    """of matches in earlier texts"""
    phrases: HitRates
    """of phrases over rejected rows, of any length"""

    @classmethod
    def of(cls, prior: Sequence[float]) -> Rates:
        """Before anything was seen."""
        return cls(HitRates(prior), HitRates(prior), HitRates((_PRIOR_PHRASE,)))


class Lookup:
    """The drafter, one a model: what it has measured is shared by all texts.

    Args:
        history: earlier texts, in which is looked up too.
    """

    source = "lookup"

    def __init__(self, history: History | None = None) -> None:
        self.rates = {True: Rates.of(_PRIOR_GREEDY), False: Rates.of(_PRIOR_SAMPLING)}
        """greedy? -> what was measured"""
        self.history = history

    def start(self, tokens: Sequence[int], greedy: bool = True) -> TextLookup:
        """Begin a text: `tokens` are its prompt."""
        return TextLookup(tokens, self.rates[greedy], None if self.history is None else self.history.index)


class TextLookup:
    """What is looked up for one text."""

    def __init__(self, tokens: Sequence[int], rates: Rates, history: SuffixIndex | None = None) -> None:
        self._index, self._rates = SuffixIndex(tokens), rates
        self._places = [(self._index, rates.text)]
        if history is not None:
            self._places.append((history, rates.history))
        self._phrases: OrderedDict[int, list[int]] = OrderedDict()
        self._phrase: list[int] = []  # the rest of the phrase that the text is in
        self._found = self._matches()

    def _matches(self) -> list[tuple[Match, SuffixIndex, HitRates]]:
        """Where the text's end has stood before, the likeliest first."""
        found = []
        for index, rates in self._places:
            end = None if index is self._index else self._index.tokens[-LONGEST:]
            found += [(match, index, rates) for match in index.matches(end)]
        if len(self._places) > 1:
            found.sort(key=lambda each: -each[2].share(each[0].length))
        return found

    def keep(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were committed, and of what was guessed for each."""
        for token in tokens:
            for _, rates in self._places:
                best = next((each for each in self._found if each[2] is rates), None)
                if best is not None:
                    rates.observe(best[0].length, best[1].continuation(best[0], 1) == [token])
            if self._phrase:
                self._rates.phrases.observe(1, self._phrase[0] == token)
            self._index.extend((token,))
            self._phrase = self._phrases.get(token, [])
            self._found = self._matches()

    def learn(self, phrase: Sequence[int]) -> None:
        """Keep a phrase that the target wrote over rejected rows: its first token, and what followed.

        The rows behind a rejected token were computed in a text that did not come about, but what the target chose
        there often comes all the same (Ouroboros, arXiv 2402.13720).
        """
        if len(phrase) < 2:
            return
        self._phrases.pop(phrase[0], None)
        self._phrases[phrase[0]] = list(phrase[1:])
        if len(self._phrases) > MOST_PHRASES:
            self._phrases.popitem(last=False)

    def offer(self, beam: Beam) -> Offer | None:
        """Up to W continuations of L - 1 tokens, equal beginnings shared; None where nothing was found."""
        paths = _Paths()
        for match, index, rates in self._found:
            tokens = index.continuation(match, beam.length - 1)
            paths.add(tokens, [rates.share(match.length + depth) for depth in range(len(tokens))])
            if paths.count == beam.width:
                break
        if paths.count < beam.width:
            tokens = self._phrase[: beam.length - 1]
            paths.add(tokens, [self._rates.phrases.share(1)] * len(tokens))
        return paths.offer()


class _Paths:
    """Continuations gathered into a tree."""

    def __init__(self) -> None:
        self.count = 0
        """paths that differ somewhere"""
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._probs: list[float] = []
        self._depths: list[int] = []
        self._child: dict[tuple[int, int], int] = {}
        self._left = 1.0  # probability that none of the paths so far begins right

    def add(self, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """Add a path, each token with the probability that it is right after the one before."""
        at, prob, size = -1, 1.0, len(self._tokens)
        for depth, (token, share) in enumerate(zip(tokens, shares, strict=True)):
            known = self._child.get((at, token))
            if known is not None:
                at, prob = known, self._probs[known]
                continue
            prob *= min(share, self._left) if depth == 0 else share
            if prob < LEAST_PROB or len(self._tokens) == SIZES[-1] - 1:
                break
            self._child[at, token] = len(self._tokens)
            self._tokens.append(token)
            self._parents.append(at)
            self._probs.append(prob)
            self._depths.append(depth + 1)
            at = len(self._tokens) - 1
        if len(self._tokens) > size:
            self.count += 1
            self._left = max(0.0, self._left - shares[0])

    def offer(self) -> Offer | None:
        """All that was gathered; None where that is nothing."""
        if not self._tokens:
            return None
        return Offer(self._tokens, self._parents, self._probs, max(self._depths))
