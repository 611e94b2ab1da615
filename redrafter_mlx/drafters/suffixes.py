"""Where the end of a text has stood before: an index of its n-grams, and the matches that they lead to.

Every n-gram of a few orders keeps a linked list of the places where it ended, so a token is added in constant time,
and nothing is scanned again. A match found through the longest n-gram is then extended backwards token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ORDERS = (4, 2, 1)
"""n-grams that are indexed, the longest first: a shorter one is asked only where no longer one was found"""
MOST_PLACES = 16
"""Places looked at for one n-gram, the latest first; more would make a common token slow."""
LONGEST = 32
"""Tokens up to which a match is extended; beyond, longer does not mean surer."""
END = -1
"""Stands between two texts."""


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens of the text have stood before, and `end` is the index of the token that followed."""

    end: int
    length: int


class SuffixIndex:
    """The tokens of a text, and of texts before it, with the places of their n-grams."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._last: list[dict[object, int]] = [{} for _ in ORDERS]
        self._before: list[list[int]] = [
            [] for _ in ORDERS
        ]  # place -> the place before it of the same n-gram
        self._begin = 0  # of the current text
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end of the text."""
        text, begin = self.tokens, self._begin
        tables = [(n, self._last[k], self._before[k]) for k, n in enumerate(ORDERS)]
        for token in tokens:
            text.append(token)
            place = len(text)
            for n, last, before in tables:
                if place - begin < n:
                    before.append(0)
                    continue
                key = token if n == 1 else tuple(text[place - n :])
                before.append(last.get(key, 0))
                last[key] = place

    def begin_text(self) -> None:
        """What follows is another text: no n-gram and no continuation spans the two."""
        self.tokens.append(END)
        for before in self._before:
            before.append(0)
        self._begin = len(self.tokens)

    def continuation(self, match: Match, count: int) -> list[int]:
        """Up to `count` tokens that followed a match, fewer where the text there ended.

        What the current text repeats up to its end goes on repeating.
        """
        found = self.tokens[match.end : match.end + count]
        if END in found:
            return found[: found.index(END)]
        period = len(self.tokens) - match.end
        while len(found) < count:
            found.append(found[-period])
        return found

    def matches(self, end: Sequence[int] | None = None) -> list[Match]:
        """Places whose tokens are those at the end of a text: longest match first, then the latest place.

        Args:
            end: the last tokens of another text; the current one by default, of which earlier places are found.
        """
        text, size = self.tokens, len(self.tokens)
        sought = text[max(self._begin, size - LONGEST) :] if end is None else end[-LONGEST:]
        found: list[Match] = []
        for k, n in enumerate(ORDERS):
            if len(sought) < n:
                continue
            key = sought[-1] if n == 1 else tuple(sought[-n:])
            place = self._before[k][size - 1] if end is None else self._last[k].get(key, 0)
            while place and len(found) < MOST_PLACES:
                length = n
                while length < min(len(sought), place) and text[place - length - 1] == sought[-length - 1]:
                    length += 1
                if place < size:
                    found.append(Match(place, length))
                place = self._before[k][place - 1]
            if found:
                break
        found.sort(key=lambda match: -match.length)  # stable: the latest place first among equals
        return found
