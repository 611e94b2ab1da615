"""Generation with models that verify chains only: prompt caches that go back to turns, and one chain of two offers."""

from __future__ import annotations

import pytest

from benchmarks.families import SEQUENCE, build
from benchmarks.often_right import OftenRight

# isort: split
import numpy as np

from redrafter_mlx.drafters.lookup import Lookup, Offer
from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.policy import Fixed
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

PROMPT = np.random.default_rng(0).integers(1, SEQUENCE, 50).tolist()


def make(family: str = "qwen3_5") -> Model:
    target = Target(build(family), family, 2048)
    target.check_tree()
    return Model(target, OftenRight(SEQUENCE))


def plain(model: Model, prompt: list[int], count: int = 20) -> list[int]:
    return generate(model, prompt, max_tokens=count, draft="off")[1].token_ids


@pytest.mark.parametrize("draft", ["off", "1x4"])
@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "rwkv7"])
def test_a_conversation_goes_on_where_it_was(family: str, draft: str) -> None:
    model, cache = make(family), PromptCache()
    text = PROMPT
    for turn in range(3):
        want = plain(model, text)
        model.drafter.follow([*text, *want], turn)
        _, stats = generate(model, text, max_tokens=20, draft=draft, cache=cache)
        assert stats.token_ids == want
        assert stats.reused_tokens >= (0 if turn == 0 else len(text) - 5)
        text = [*text, *want, 7, 8, 9]


def test_the_same_prompt_again_and_a_turn_back() -> None:
    """The states before the last prompt token, and after each of the last turns, are at hand."""
    model, cache = make(), PromptCache()
    first = generate(model, PROMPT, max_tokens=20, draft="off", cache=cache)[1].token_ids
    longer = [*PROMPT, *first, 7, 8]
    generate(model, longer, max_tokens=20, draft="off", cache=cache)
    other = [*PROMPT, *first, 11, 12]
    _, stats = generate(model, other, max_tokens=20, draft="off", cache=cache)
    assert stats.reused_tokens >= len(PROMPT) + len(first) - 1 and stats.token_ids == plain(model, other)
    _, stats = generate(model, PROMPT, max_tokens=20, draft="off", cache=cache)
    assert stats.reused_tokens == len(PROMPT) - 1 and stats.token_ids == first
    _, stats = generate(model, PROMPT[:20], max_tokens=20, draft="off", cache=cache)
    assert stats.reused_tokens == 0 and stats.token_ids == plain(model, PROMPT[:20])


@pytest.mark.parametrize("read", [1, 2, 3, 7])
def test_an_answer_that_was_broken_off(read: int) -> None:
    """Within an accepted path too: the cache holds no more than what was emitted."""
    model, cache = make(), PromptCache()
    want = plain(model, PROMPT)
    model.drafter.follow([*PROMPT, *want], 3)
    stream = stream_generate(model, PROMPT, max_tokens=20, draft="1x6", cache=cache)
    said = [next(stream).token for _ in range(read)]
    stream.close()  # type: ignore[attr-defined]
    assert said == want[:read] and cache.kv is not None and len(cache.tokens) <= len(PROMPT) + read
    longer = [*PROMPT, *said, 5]
    _, stats = generate(model, longer, max_tokens=20, draft="off", cache=cache)
    assert stats.token_ids == plain(model, longer) and stats.reused_tokens >= len(PROMPT) - 1


def test_a_family_whose_rows_depend_on_the_cut_reads_its_prompt_anew() -> None:
    model, cache = make("plamo3"), PromptCache()
    text = PROMPT
    for _ in range(2):
        _, stats = generate(model, text, max_tokens=20, draft="off", cache=cache)
        assert stats.reused_tokens == 0 and stats.token_ids == plain(model, text)
        text = [*text, *stats.token_ids, 7]


def test_one_chain_of_two_offers_is_verified() -> None:
    """What is looked up and what is drafted would be a tree together."""
    model = make("lfm2")
    model.lookup = Lookup()
    text = PROMPT[:12] * 4
    want = plain(model, text, 60)
    model.drafter.follow([*text, *want], 3)
    _, stats = generate(model, text, max_tokens=60, draft="1x5")
    assert stats.token_ids == want
    assert stats.accepted_tokens > 0 and stats.steps < 59


def test_the_better_of_two_chains() -> None:
    policy, beam = Fixed(Beam(1, 5)), Beam(1, 5)
    assert policy.prefers_lookup(beam, [0.9, 0.8, 0.7])
    assert not policy.prefers_lookup(beam, [0.5, 0.2])


def test_the_best_path_of_an_offer() -> None:
    offer = Offer([1, 2, 3, 4, 5], [-1, -1, 0, 1, 3], [0.3, 0.6, 0.2, 0.5, 0.1], 3)
    path = offer.best_path()
    assert (path.tokens, path.parents, path.probs, path.height) == ([2, 4, 5], [-1, 0, 1], [0.6, 0.5, 0.1], 3)
    assert path.candidates().is_chain
    assert Offer([], [], [], 0).best_path().tokens == []
