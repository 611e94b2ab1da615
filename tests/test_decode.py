"""Speculative output equals plain output with the same seed, for every family, cache, tree and setting."""

from __future__ import annotations

import pytest

from tests.toy import FAMILIES, VOCAB, make, make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Stats
from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.sampling import Sampling

DRAFTS = ["1x4", "3x4", "4x3@5", "8x5@16"]
SETTINGS = {
    "greedy": Sampling(),
    "t0.7": Sampling(temperature=0.7, seed=3),
    "filters": Sampling(temperature=1.0, top_p=0.9, top_k=20, min_p=0.01, seed=4),
    "penalties": Sampling(
        temperature=0.9, seed=5, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1,
        logit_bias={7: 2.0},
    ),
}  # fmt: skip
PROMPT = [5, 9, 33, 2, 17]


def run(model: Model, draft: str, sampling: Sampling, count: int = 32, **options: object) -> list[int]:
    _, stats = generate(model, PROMPT, max_tokens=count, sampling=sampling, draft=draft, **options)
    assert stats.generated_tokens == len(stats.token_ids) == count
    return stats.token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_speculative_is_plain(family: str, setting: str) -> None:
    model = make(family)
    plain = run(model, "off", SETTINGS[setting])
    assert len(set(plain)) > 4, "a degenerate text would prove nothing"
    for draft in DRAFTS:
        assert run(model, draft, SETTINGS[setting]) == plain, draft


@pytest.mark.parametrize("family", ["llama", "llama_window", "gemma3"])
def test_speculative_is_plain_with_a_trained_like_drafter(family: str) -> None:
    """A drafter that shares the target's head on its hidden state is right now and then, so paths branch."""
    target = make_target(family)
    drafter = make_drafter(target, head="factored", num_draft_layers=0)
    weight = np.zeros((target.hidden_size, 2 * target.hidden_size), dtype=np.float32)
    weight[:, : target.hidden_size] = np.eye(target.hidden_size)
    drafter.lm_head[-1].weight = mx.array(weight) * 0.3
    model = Model(target, drafter)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=11)):
        plain = run(model, "off", sampling, 120)
        accepted = 0
        for draft in ("2x3", "8x5@32", "16x4"):
            _, stats = generate(model, PROMPT, max_tokens=120, sampling=sampling, draft=draft)
            assert stats.token_ids == plain
            accepted += stats.accepted_tokens
        assert accepted > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_cache(bits: int) -> None:
    target = make_wide_head()
    model = Model(target, make_drafter(target))
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=1)):
        plain = run(model, "off", sampling, kv_bits=bits)
        for draft in DRAFTS:
            assert run(model, draft, sampling, kv_bits=bits) == plain


def make_wide_head() -> object:
    """A llama whose heads are as wide as a quantisation group."""
    from mlx_lm.models.llama import Model as Llama
    from mlx_lm.models.llama import ModelArgs

    from redrafter_mlx.target import Target

    mx.random.seed(3)
    args = ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=1,
        rms_norm_eps=1e-5, vocab_size=VOCAB, head_dim=64,
    )  # fmt: skip
    model = Llama(args)
    model.model.embed_tokens.weight = mx.random.normal((VOCAB, 64)) * 0.5
    return Target(model, "wide", 512)


def test_context_layers_reach_the_drafter() -> None:
    model = make("llama", context_layers=(0, 2))
    assert model.drafter is not None and model.drafter.config.context_size == 3 * 32
    plain = run(model, "off", Sampling())
    assert run(model, "3x4", Sampling()) == plain


def test_long_prompt_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than one prefill block gives what one block gives."""
    import redrafter_mlx.decode as decode

    prompt = [(7 * i + i * i) % VOCAB for i in range(300)]
    for family in ("llama", "gemma3"):
        model = make(family)
        _, whole = generate(model, prompt, max_tokens=20, draft="3x4")
        monkeypatch.setattr(decode, "PREFILL_BLOCK", 64)
        _, blocks = generate(model, prompt, max_tokens=20, draft="3x4")
        monkeypatch.undo()
        assert blocks.token_ids == whole.token_ids


def test_one_synchronisation_per_step() -> None:
    model = make("llama")
    for draft in ("off", "1x4", "3x4", "8x5@16"):
        _, stats = generate(model, PROMPT, max_tokens=30, draft=draft)
        assert stats.syncs == stats.steps


def test_stats_add_up() -> None:
    model = make("llama")
    _, stats = generate(model, PROMPT, max_tokens=30, draft="3x4@7")
    assert stats.drafted_tokens == 6 * stats.steps
    assert stats.accepted_tokens == sum(stats.accepted_by_depth)
    assert stats.tokens_per_step == pytest.approx(1 + stats.accepted_tokens / stats.steps)
    assert stats.prompt_tokens == len(PROMPT) and stats.finish_reason == "length"
    both = Stats()
    for draft in ("off", "3x4@7"):
        both.add(generate(model, PROMPT, max_tokens=30, draft=draft)[1])
    assert (both.steps, both.syncs) == (29 + stats.steps, 29 + stats.steps)
    assert both.acceptance == tuple(count / both.steps for count in stats.accepted_by_depth)
    one, other = Stats(), Stats()
    one.observe(4, 1)
    other.observe(7, 2)
    one.add(other)
    assert (one.accepted_by_depth, one.drafted_tokens, one.tokens_per_step) == ([2, 1], 9, 2.5)


@pytest.mark.parametrize("draft", ["off", "3x4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompt_cache_continues(family: str, draft: str) -> None:
    """A second turn on the kept cache gives what a fresh one gives, and reuses what it shares."""
    model, cache = make(family), PromptCache()
    _, first = generate(model, PROMPT, max_tokens=10, draft=draft, cache=cache)
    second_prompt = [*PROMPT, *first.token_ids, 3, 4]
    _, second = generate(model, second_prompt, max_tokens=10, draft=draft, cache=cache)
    _, fresh = generate(model, second_prompt, max_tokens=10, draft="off")
    assert second.token_ids == fresh.token_ids
    assert second.reused_tokens >= len(PROMPT) + 8


def test_abandoned_stream_leaves_a_usable_cache() -> None:
    model, cache = make("llama"), PromptCache()
    stream = stream_generate(model, PROMPT, max_tokens=30, draft="3x4", cache=cache)
    said = [next(stream).token for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    assert cache.tokens == [*PROMPT, *said][: len(cache.tokens)]
    assert cache.kv is not None and cache.kv.length == len(cache.tokens)
    prompt = [*PROMPT, *said, 1]
    _, again = generate(model, prompt, max_tokens=10, cache=cache)
    assert again.token_ids == generate(model, prompt, max_tokens=10, draft="off")[1].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"max_tokens": 600}, "more than the context of 512"),
        ({"draft": "3y4"}, "draft must be auto, off"),
        ({"draft": "3x1"}, "length >= 2"),
        ({"draft": "100x5@8"}, "beam width must be at most"),
        ({"stop": ["x"]}, "need a tokenizer"),
        ({"kv_bits": 7}, "kv_bits must be"),
    ],
)
def test_refused_before_any_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_generate(make("llama"), PROMPT, **options)


def test_refuses_bad_prompts() -> None:
    model = make("llama")
    for prompt, message in (
        ([], "empty"),
        ([VOCAB], "0..63"),
        ([-1], "0..63"),
        ("hi", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_generate(model, prompt)


@pytest.mark.parametrize("draft", ["off", "3x3@5"])
def test_memory_does_not_grow_with_the_text(draft: str) -> None:
    """A graph that is never let go would hold every step's arrays; only attention's scores may grow."""
    model = make("llama")
    model.target.max_length = 8192
    peaks = [
        chunk.stats.peak_memory_bytes
        for chunk in stream_generate(model, PROMPT, max_tokens=4000, draft=draft)
    ]
    heads, rows, copies = 4, 5, 4
    assert len(peaks) == 4000
    assert peaks[-1] - peaks[200] <= copies * heads * rows * 4000 * 4


@pytest.mark.parametrize("draft", ["off", "1x3", "3x3@5"])
def test_the_cache_is_written_in_place(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what is set going is done when the call returns: on a busy machine the device may still read an array when it
    # is written next, which MLX then copies
    monkeypatch.setattr(mx, "async_eval", mx.eval)
    cache, model = PromptCache(), make("llama")

    def addresses() -> list[int]:
        assert cache.kv is not None
        views = [np.array(array, copy=False) for array in cache.kv.arrays()]
        return [view.__array_interface__["data"][0] for view in views]

    seen = []
    for index, _ in enumerate(stream_generate(model, PROMPT, max_tokens=60, draft=draft, cache=cache)):
        if index in (10, 50):
            seen.append(addresses())
    assert len(seen[0]) == 6 and seen[0] == seen[1]
