"""Figures of generations: they add up, and count what was emitted."""

from __future__ import annotations

import pytest

from tests.toy import make

# isort: split
from redrafter_mlx.generation import generate
from redrafter_mlx.stats import Stats

PROMPT = [5, 9, 33, 2, 17]


def test_stats_of_a_generation_add_up() -> None:
    _, stats = generate(make("llama"), PROMPT, max_tokens=30, draft="3x4@7")
    assert stats.drafted_tokens == 6 * stats.steps
    assert stats.accepted_tokens == sum(stats.accepted_by_depth)
    assert stats.decoded_tokens == 29 and stats.tokens_per_step == pytest.approx(29 / stats.steps)
    assert stats.prompt_tokens == len(PROMPT) and stats.finish_reason == "length"


def test_generations_are_added_up() -> None:
    model, both = make("llama"), Stats()
    for draft in ("off", "3x4@7"):
        both.add(stats := generate(model, PROMPT, max_tokens=30, draft=draft)[1])
    assert (both.steps, both.syncs) == (29 + stats.steps, 29 + stats.steps)
    assert both.acceptance == tuple(count / both.steps for count in stats.accepted_by_depth)
    assert both.generated_tokens == 60


def test_steps_are_counted_by_what_they_emitted() -> None:
    one, other = Stats(), Stats()
    one.observe(4, 2)
    other.observe(7, 3)
    one.add(other)
    assert (one.accepted_by_depth, one.drafted_tokens, one.tokens_per_step) == ([2, 1], 9, 2.5)
