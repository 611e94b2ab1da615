"""The cache after `keep` is the cache of plain decoding, for every kind; rollback to any length."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from benchmarks.families import build as build_family
from tests.offers import random_offer
from tests.toy import VOCAB, make, make_target, make_wide_head

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.target import Target
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.target.keys_values import BLOCK
from redrafter_mlx.tree import build, chain

QUANTIZED = {"quantized": 64, "quantized, heads of 96": 96}
KINDS = ["llama", "llama_window", "gemma3", *QUANTIZED]


def setup(kind: str) -> tuple[Target, KVCache, KVCache]:
    target = make_wide_head(QUANTIZED[kind]) if kind in QUANTIZED else make_target(kind)
    bits = 8 if kind in QUANTIZED else None
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
        offer = random_offer(rng, 4, 4, vocab=VOCAB)
        tree = build(offer, mx.array(int(rng.integers(VOCAB))), int(rng.integers(2, 14)))
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
    original = layer.gather
    monkeypatch.setattr(layer, "gather", lambda self, p: (gathered.append(1), original(self, p))[1])
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
    assert cache.layers[0].keys.shape[2] == 3 * BLOCK
    nbytes = cache.nbytes
    for _ in range(10):
        target.extend(mx.arange(50) % VOCAB, cache)
    assert cache.nbytes == nbytes


def test_other_states_are_refused() -> None:
    import mlx.nn as nn
    from mlx_lm.models.cache import CacheList, ConcatenateKVCache, RotatingKVCache
    from mlx_lm.models.cache import KVCache as Plain

    class Strange(nn.Module):
        def __init__(self, made: object) -> None:
            super().__init__()
            self.made = [made]

        def make_cache(self) -> list[object]:
            return [Plain(), *self.made]

    for made, kind in (
        (ConcatenateKVCache(), "ConcatenateKVCache"),
        (CacheList(Plain(), ConcatenateKVCache()), "ConcatenateKVCache"),
        (RotatingKVCache(8, keep=4), "RotatingKVCache that keeps its first rows"),
    ):
        with pytest.raises(ValueError, match=f"layer 1 of .* keeps a {kind}; keys and values"):
            KVCache.of(Strange(made))


def test_memory_is_freed_with_the_last_reference() -> None:
    """At once, not when Python's garbage collector next looks for cycles."""
    target = make_target()
    cache = target.new_cache()
    mx.eval(target.extend(mx.arange(5), cache).contexts)
    kept = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("head_size", "group_size"), [(64, 64), (96, 32), (128, 64), (160, 32)])
def test_quantized_in_the_largest_groups_that_divide_a_head(head_size: int, group_size: int) -> None:
    target = make_wide_head(head_size)
    cache = target.new_cache(4)
    mx.eval(target.extend(mx.arange(5), cache).logits)
    values, scales, _ = cache.layers[0].keys
    assert cache.group_size == group_size
    assert scales.shape[-1] == head_size // group_size and values.shape[-1] == head_size * 4 // 32


def test_drafting_with_quantized_heads_of_96() -> None:
    model = make("llama", head_dim=96)
    plain, drafted = (
        generate(model, [5, 9, 33], max_tokens=24, draft=draft, kv_bits=8)[1].token_ids
        for draft in ("off", "3x4@8")
    )
    assert plain == drafted and len(set(plain)) > 4


@pytest.mark.parametrize("head_size", [80, 8])
def test_heads_that_cannot_be_quantized_are_one_error_before_any_work(
    head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make_target("llama", head_dim=head_size))
    for name in ("extend", "verify"):
        monkeypatch.setattr(model.target, name, lambda *given: pytest.fail("work"))
    cache = PromptCache()
    with pytest.raises(ValueError, match=f"^kv_bits needs heads .* multiple of 32, .* are {head_size}$"):
        stream_generate(model, [1, 2, 3], kv_bits=8, cache=cache)
    assert cache.kv is None and not cache.in_use


@pytest.mark.parametrize("bits", [0, 1, 7, 16, 4.0, "8", True])
def test_bits_that_mlx_does_not_have(bits: int) -> None:
    with pytest.raises(ValueError, match="^kv_bits must be one of 2, 3, 4, 5, 6, 8, not "):
        make_wide_head().new_cache(bits)


def test_another_stream_waits_while_the_size_of_the_heads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `kv_bits` the model runs once more, and its hidden states are noted in one place for all streams."""
    model = make("llama", head_dim=64)
    new_cache, is_free = model.target.new_cache, []

    def watched(bits: int | None = None) -> KVCache:
        other = threading.Thread(target=lambda: is_free.append(model.lock.acquire(blocking=False)))
        other.start()
        other.join()
        return new_cache(bits)

    monkeypatch.setattr(model.target, "new_cache", watched)
    stream_generate(model, [1, 2, 3], kv_bits=8, draft="off")
    assert is_free == [False]


def test_the_size_of_the_heads_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs for it: not again for every text."""
    target = make_wide_head()
    caches = [target.new_cache(8)]
    monkeypatch.setattr(target, "model", None)
    monkeypatch.setattr(KVCache, "of", lambda model, bits, group_size: caches[0])
    assert target.new_cache(4) is caches[0]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma2", "phi", "gemma4_text"])
def test_attention_that_takes_nothing_quantized_is_refused_before_any_work(family: str) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "qk_rope_head_dim": 32, "global_head_dim": 32}
    target = Target(build_family(family, changes=sizes), family)
    with pytest.raises(
        ValueError, match=f"^kv_bits cannot serve mlx_lm.models.{family}: its attention takes no"
    ):
        target.new_cache(8)
    assert target.new_cache().bits is None


def test_chunks_that_are_over_are_forgotten() -> None:
    """Llama 4's rows attend within their chunk; the model itself makes the mask, from the front that it is told."""
    target = Target(build_family("llama4"), "llama4")
    cache, plain = target.new_cache(), target.new_cache()
    tokens = [(3 * i * i + i) % 140 for i in range(2 * BLOCK + 102)]
    for start in range(0, len(tokens), 21):
        target.verify(chain(mx.array([*tokens[start : start + 21], 1])), cache)
        cache.keep(range(len(tokens[start : start + 21])))
        assert cache.layers[0].num_rows <= BLOCK + 8 + 22
    got = target.verify(chain(mx.array([7, 8])), cache).logits
    target.extend(mx.array(tokens), plain)
    want = target.verify(chain(mx.array([7, 8])), plain).logits
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert cache.layers[0].start_position > 0 and cache.layers[3].start == 0
    assert cache.can_trim_to(len(tokens) - 1) and not cache.can_trim_to(5)
