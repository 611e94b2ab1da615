"""Recurrent states: what is kept of a verified chain is the state of plain decoding, without a second forward."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.families import SEQUENCE, build

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.target import Target
from redrafter_mlx.target.cache import MOST_MARKS, KVCache
from redrafter_mlx.target.recurrent import RecurrentState
from redrafter_mlx.tree import TokenTree, ancestor_mask, chain

KINDS = (
    "qwen3_5", "kimi_linear", "mamba", "jamba", "mamba2", "nemotron_h", "falcon_h1", "bailing_hybrid", "lfm2",
    "baichuan_m1", "recurrent_gemma", "rwkv7", "longcat_flash_ngram",
)  # fmt: skip
PROMPT = mx.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=mx.int32)


def make(kind: str) -> Target:
    return Target(build(kind), kind)


def one(target: Target, cache: KVCache, token: int) -> np.ndarray:
    """Logits (V,) of a plain step."""
    logits = target.verify(chain(mx.array([token])), cache).logits[0]
    cache.commit(1)
    return np.array(logits)


def states(cache: KVCache) -> list[np.ndarray]:
    return [np.array(a) for s in cache.states if isinstance(s, RecurrentState) for a in s.arrays()]


def assert_same(mine: KVCache, plain: KVCache) -> None:
    assert mine.length == plain.length
    for got, want in zip(states(mine), states(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("kind", KINDS)
def test_keep_equals_plain_decoding(kind: str) -> None:
    target = make(kind)
    cache, plain = target.new_cache(), target.new_cache()
    rng = np.random.default_rng(1)
    for each in (cache, plain):
        target.extend(PROMPT, each)
    for accepted in (2, 4, 1, 3):
        tokens = rng.integers(1, SEQUENCE, 4).tolist()
        got = np.array(target.verify(chain(mx.array(tokens)), cache).logits)
        cache.keep(range(accepted))
        want = [one(target, plain, token) for token in tokens[:accepted]]
        np.testing.assert_allclose(got[:accepted], want, atol=2e-3)
        assert_same(cache, plain)


@pytest.mark.parametrize("kind", ["qwen3_5", "nemotron_h", "lfm2", "rwkv7"])
def test_a_replay_multiplies_with_no_weights_and_does_not_wait(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(kind)
    cache = target.new_cache()
    target.extend(PROMPT, cache)
    target.verify(chain(mx.array([1, 2, 3, 4])), cache)
    for module in target.model.modules():
        kind_before = type(module).__mro__[1]  # the recorder has given the module a class of its own
        if issubclass(kind_before, nn.Linear):
            monkeypatch.setattr(kind_before, "__call__", refused)
    monkeypatch.setattr(mx, "eval", refused)
    cache.keep([0, 1])
    assert cache.length == len(PROMPT) + 2


def refused(*args: Any) -> None:
    raise AssertionError("something was run again")


def test_all_rows_accepted_need_no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make("qwen3_5")
    cache = target.new_cache()
    monkeypatch.setattr(type(cache.recorder), "replay", refused)
    target.extend(PROMPT, cache)
    target.verify(chain(mx.array([1, 2, 3])), cache)
    cache.keep([0, 1, 2])
    with pytest.raises(AssertionError, match="run again"):
        target.verify(chain(mx.array([1, 2, 3])), cache)
        cache.keep([0, 1])


def test_a_verification_that_is_not_kept_leaves_no_trace() -> None:
    target = make("qwen3_5")
    cache, plain = target.new_cache(), target.new_cache()
    for each in (cache, plain):
        target.extend(PROMPT, each)
    for rows in (1, 4, 2):
        target.verify(chain(mx.arange(rows)), cache)
    np.testing.assert_allclose(one(target, cache, 7), one(target, plain, 7), atol=1e-4)


def test_two_texts_are_verified_in_turn() -> None:
    """What the recurrence of one text read is not replayed for the other."""
    target = make("qwen3_5")
    caches, plains = ([target.new_cache() for _ in range(2)] for _ in range(2))
    for index in range(2):
        for each in (caches[index], plains[index]):
            target.extend(PROMPT[index:], each)
    for index, cache in enumerate(caches):
        target.verify(chain(mx.array([10 + index, 20, 30])), cache)
    for index, (cache, plain) in enumerate(zip(caches, plains, strict=True)):
        cache.keep([0, 1])
        for token in (10 + index, 20):
            one(target, plain, token)
        assert_same(cache, plain)


@pytest.mark.parametrize("kind", ["qwen3_5", "rwkv7"])
def test_going_back_into_the_last_forward_and_to_marks(kind: str) -> None:
    target = make(kind)
    cache = target.new_cache()
    tokens = [int(token) for token in PROMPT.tolist()]
    target.extend(PROMPT, cache)
    cache.mark()
    target.extend(mx.array([11, 12, 13]), cache)
    target.verify(chain(mx.array([21, 22, 23, 24])), cache)
    cache.keep([0, 1, 2])
    assert [length for length in range(15) if cache.can_trim_to(length)] == [0, 8, 11, 12, 13, 14]
    assert [cache.reach(length) for length in (14, 13, 10, 7)] == [14, 13, 8, 0]
    for length, text in ((12, [*tokens, 11, 12, 13, 21]), (8, tokens)):
        cache.trim(cache.length - length)
        plain = target.new_cache()
        target.extend(mx.array(text), plain)
        assert_same(cache, plain)
        np.testing.assert_allclose(
            np.array(target.verify(chain(mx.array([5])), cache).logits),
            np.array(target.verify(chain(mx.array([5])), plain).logits), atol=1e-3,
        )  # fmt: skip
    with pytest.raises(ValueError, match="cannot go back to 5 positions: a recurrent state cannot"):
        cache.trim(3)


def test_few_marks_are_kept() -> None:
    target = make("lfm2")
    cache = target.new_cache()
    for index in range(MOST_MARKS + 3):
        target.extend(mx.array([index + 1, 2]), cache)
        cache.mark()
    lengths = [2 * (index + 1) for index in range(MOST_MARKS + 3)]
    marks = [length for length in lengths if cache.can_trim_to(length)]
    assert marks == lengths[-MOST_MARKS:]


def test_a_tree_is_refused_with_the_reason() -> None:
    target = make("qwen3_5")
    parents = mx.array([0, 0, 0], dtype=mx.int32)
    tree = TokenTree(mx.array([1, 2, 3]), parents, mx.array([0, 1, 1]), ancestor_mask(parents, 1), 1)
    assert not target.branches
    with pytest.raises(
        ValueError, match="qwen3_5 verifies chains, not trees: a recurrent state follows one path"
    ):
        target.verify(tree, target.new_cache())


def test_other_models_of_the_process_are_left_alone() -> None:
    from mlx_lm.models.cache import make_prompt_cache

    alone = build("qwen3_5")
    kinds = [type(module) for module in alone.modules()]
    made = make_prompt_cache(alone)
    want = np.array(alone(PROMPT[None], cache=made))
    target = make("qwen3_5")
    cache = target.new_cache()
    target.verify(chain(PROMPT), cache)
    cache.keep([0, 1])
    assert [type(module) for module in alone.modules()] == kinds
    np.testing.assert_array_equal(np.array(alone(PROMPT[None], cache=make_prompt_cache(alone))), want)
    again = np.array(target.model(PROMPT[None], cache=make_prompt_cache(target.model)))
    np.testing.assert_allclose(
        again, want, atol=1e-4, err_msg="the model itself still runs on mlx-lm's caches"
    )


def test_kv_bits_need_keys_and_values() -> None:
    with pytest.raises(ValueError, match="^kv_bits needs keys and values, and .*rwkv7 keeps none$"):
        make("rwkv7").new_cache(8)


def test_convolved_keys_and_values_are_quantized_in_a_replay_too() -> None:
    """Baichuan M1's recurrence is within its attention, which runs again without being computed."""
    target = Target(build("baichuan_m1", changes={"hidden_size": 128}), "baichuan_m1")
    cache, plain = target.new_cache(8), target.new_cache(8)
    for each in (cache, plain):
        target.extend(PROMPT, each)
    target.verify(chain(mx.array([1, 2, 3])), cache)
    cache.keep([0, 1])
    for token in (1, 2):
        one(target, plain, token)
    assert_same(cache, plain)
