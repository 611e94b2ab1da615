"""The cache after `keep` is the cache of plain decoding, for every kind; rollback to any length."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.test_decode import make_wide_head
from tests.test_tree import random_levels
from tests.toy import VOCAB, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.cache import BLOCK, KVCache
from redrafter_mlx.target import Target
from redrafter_mlx.tree import build, chain

KINDS = ["llama", "llama_window", "gemma3", "quantised"]


def setup(kind: str) -> tuple[Target, KVCache, KVCache]:
    target = make_wide_head() if kind == "quantised" else make_target(kind)
    assert isinstance(target, Target)
    bits = 8 if kind == "quantised" else None
    return target, target.new_cache(bits), target.new_cache(bits)


def rows(cache: KVCache) -> list[np.ndarray]:
    """The committed keys and values of every layer, from what its window still needs."""
    out = []
    for layer in cache.layers:
        first = max(0, cache.length - layer.window + 1) if layer.window else 0
        assert layer.start <= first
        for array in layer.arrays():
            out.append(np.array(array[..., first - layer.start : cache.length - layer.start, :]))
    return out


def random_path(rng: np.random.Generator, parents: list[int]) -> list[int]:
    """Down from the root, stopping by chance."""
    path = [0]
    while children := [n for n in range(1, len(parents)) if parents[n] == path[-1]]:
        if rng.random() < 0.2:
            break
        path.append(int(rng.choice(children)))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_keep_equals_plain_decoding(kind: str, seed: int) -> None:
    target, cache, plain = setup(kind)
    rng = np.random.default_rng(seed)
    prompt = mx.array(rng.integers(0, VOCAB, 9), dtype=mx.int32)
    for c in (cache, plain):
        target.extend(prompt, c)
    for _ in range(8):
        levels = random_levels(rng, 4, 4, vocab=VOCAB)
        tree = build(levels, mx.array(int(rng.integers(VOCAB))), int(rng.integers(2, 13)))
        verified = target.verify(tree, cache)
        path = random_path(rng, tree.parents.tolist())
        cache.keep(path)
        for index, token in enumerate(tree.tokens[mx.array(path)]):
            one = target.verify(chain(token.reshape(1)), plain)
            plain.commit(1)
            np.testing.assert_allclose(verified.logits[path[index]], one.logits[0], atol=2e-4, rtol=1e-3)
        assert cache.length == plain.length
        for mine, theirs in zip(rows(cache), rows(plain), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1 if mine.dtype == np.uint32 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_trim_to_any_length(kind: str) -> None:
    target, cache, plain = setup(kind)
    tokens = mx.array([(5 * i * i + 3) % VOCAB for i in range(40)], dtype=mx.int32)
    want = target.verify(chain(tokens), plain).logits
    target.extend(tokens, cache)
    for length in (39, 30, 17, 16, 3, 0):
        cache.trim(cache.length - length)
        got = target.verify(chain(tokens[length:]), cache).logits
        np.testing.assert_allclose(got, want[length:], atol=2e-4, rtol=1e-3)
        cache.commit(40 - length)


def test_trim_limits() -> None:
    target, cache, _ = setup("llama")
    target.extend(mx.array([1, 2, 3]), cache)
    for count in (4, -1):
        with pytest.raises(ValueError, match=f"cannot trim {count} positions of 3"):
            cache.trim(count)


def test_window_forgets_and_says_so() -> None:
    """Memory of a windowed layer stays bounded, and going back further than it holds is refused."""
    target, cache, plain = setup("llama_window")
    tokens = [(3 * i * i + i) % VOCAB for i in range(2 * BLOCK + 100)]
    for start in range(0, len(tokens), 20):
        target.extend(mx.array(tokens[start : start + 20]), cache)
        assert cache.layers[0].num_rows <= 12 + BLOCK + 20
    got = target.verify(chain(mx.array([7])), cache).logits
    want = target.verify(chain(mx.array([*tokens, 7])), plain).logits[-1:]
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-3)
    assert cache.layers[0].start > 0 and cache.layers[1].start == 0
    with pytest.raises(ValueError, match="sliding window has dropped"):
        cache.trim(len(tokens) - 5)


def test_first_rows_are_a_trim_and_others_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    target, cache, _ = setup("llama")
    gathered: list[int] = []
    layer = type(cache.layers[0])
    original = layer.pick
    monkeypatch.setattr(layer, "pick", lambda self, p: (gathered.append(1), original(self, p))[1])
    target.verify(chain(mx.array([1, 2, 3, 4])), cache)
    cache.keep([0, 1, 2])
    assert not gathered and cache.length == 3
    target.verify(chain(mx.array([1, 2, 3, 4])), cache)
    cache.keep([0, 2])
    assert len(gathered) == len(cache.layers) and cache.length == 5


def test_reserved_buffers_are_not_reallocated() -> None:
    target, cache, _ = setup("llama")
    cache.reserve(3 * BLOCK)
    target.extend(mx.array([1, 2, 3]), cache)
    assert cache.layers[0].keys is not None and cache.layers[0].keys[0].shape[2] == 3 * BLOCK
    nbytes = cache.nbytes
    for _ in range(10):
        target.extend(mx.arange(50) % VOCAB, cache)
    assert cache.nbytes == nbytes


def test_other_states_are_refused() -> None:
    import mlx.nn as nn
    from mlx_lm.models.cache import ArraysCache

    class Recurrent(nn.Module):
        def make_cache(self) -> list[object]:
            return [ArraysCache(2)]

    with pytest.raises(ValueError, match="ArraysCache in layer 0"):
        KVCache.of(Recurrent())


def test_memory_is_freed_with_the_last_reference() -> None:
    """At once, not when Python's garbage collector next looks for cycles."""
    target = make_target()
    cache = target.new_cache()
    mx.eval(target.extend(mx.arange(5), cache).hidden)
    kept = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert kept() is None
    finally:
        gc.enable()
