"""The suffix index: against a search of the whole text, and what it continues with."""

from __future__ import annotations

import random

import pytest

from redrafter_mlx.drafters.suffixes import LONGEST, ORDERS, Match, SuffixIndex


def longest_match(tokens: list[int]) -> int:
    """Length of the longest suffix that has stood before, by trying every place."""
    best = 0
    for place in range(1, len(tokens)):
        length = 0
        while length < min(place, LONGEST) and tokens[place - length - 1] == tokens[len(tokens) - length - 1]:
            length += 1
        best = max(best, length)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_finds_the_longest_match_of_short_texts(seed: int) -> None:
    """Where no n-gram has more places than are looked at, the match is the longest there is."""
    rng = random.Random(seed)
    index, text = SuffixIndex(), list[int]()
    for _ in range(60):
        token = rng.randrange(8)
        text.append(token)
        index.extend([token])
        found = index.matches()
        assert (found[0].length if found else 0) == longest_match(text)
        for match in found:
            assert text[match.end - match.length : match.end] == text[len(text) - match.length :]


def test_the_latest_of_equally_long_matches_comes_first() -> None:
    index = SuffixIndex([1, 2, 9, 1, 2, 8, 1, 2])
    assert [match.end for match in index.matches()] == [5, 2]
    assert index.continuation(index.matches()[0], 3) == [8, 1, 2]


def test_what_repeats_up_to_the_end_goes_on() -> None:
    index = SuffixIndex([5, 1, 2, 1, 2])
    assert index.continuation(index.matches()[0], 5) == [1, 2, 1, 2, 1]


def test_nothing_spans_two_texts() -> None:
    index = SuffixIndex([1, 2, 3])
    index.begin_text()
    index.extend([3])
    assert index.matches() == [Match(3, 1)]
    assert index.continuation(index.matches()[0], 4) == [], "the earlier text ended there"
    index.extend([1, 2])
    assert index.continuation(index.matches()[0], 4) == [3]


def test_a_token_is_indexed_in_constant_time() -> None:
    """Each token adds one entry per order, and no more, however often it came before."""
    index = SuffixIndex([7] * 1000)
    assert sum(len(last) for last in index._last) == len(ORDERS)
    assert all(len(before) == 1000 for before in index._before)
