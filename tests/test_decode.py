"""Speculative output equals plain output with the same seed, for every family, cache, tree and setting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.mark import ParameterSet

from tests.toy import FAMILIES, VOCAB, make, make_drafter, make_often_right, make_target, make_wide_head

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx import decode
from redrafter_mlx.decode import Text, prefill, step
from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.policy import Fixed, Off
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import Beam

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
slow = pytest.mark.slow


def run(model: Model, draft: str, sampling: Sampling, count: int = 32, **options: object) -> list[int]:
    _, stats = generate(model, PROMPT, max_tokens=count, sampling=sampling, draft=draft, **options)
    assert stats.generated_tokens == len(stats.token_ids) == count
    return stats.token_ids


def every_pair() -> list[ParameterSet]:
    """Every family with every setting; those with one setting each, all four in turn, are the quick ones."""
    return [
        pytest.param(family, setting, marks=() if row % len(SETTINGS) == column else pytest.mark.slow)
        for row, family in enumerate(FAMILIES)
        for column, setting in enumerate(SETTINGS)
    ]


@pytest.mark.parametrize(("family", "setting"), every_pair())
def test_speculative_is_plain(family: str, setting: str) -> None:
    model = make(family)
    plain = run(model, "off", SETTINGS[setting])
    assert len(set(plain)) > 4, "a degenerate text would prove nothing"
    for draft in DRAFTS:
        assert run(model, draft, SETTINGS[setting]) == plain, draft


def right_now_and_then(family: str) -> Model:
    target = make_target(family)
    return Model(target, make_often_right(target))


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=slow), "llama_window", pytest.param("gemma3", marks=slow)]
)
def test_speculative_is_plain_with_a_trained_like_drafter(family: str) -> None:
    model = right_now_and_then(family)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=11)):
        plain = run(model, "off", sampling, 120)
        accepted = 0
        for draft in ("2x3", "8x5@32", "16x4"):
            _, stats = generate(model, PROMPT, max_tokens=120, sampling=sampling, draft=draft)
            assert stats.token_ids == plain
            accepted += stats.accepted_tokens
        assert accepted > 0


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=slow)])
def test_quantized_cache(bits: int) -> None:
    target = make_wide_head()
    model = Model(target, make_drafter(target))
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=1)):
        plain = run(model, "off", sampling, kv_bits=bits)
        for draft in DRAFTS:
            assert run(model, draft, sampling, kv_bits=bits) == plain


def test_context_layers_reach_the_drafter() -> None:
    model = make("llama", context_layers=(0, 2))
    assert model.drafter is not None and model.drafter.config.context_size == 3 * 32
    plain = run(model, "off", Sampling())
    assert run(model, "3x4", Sampling()) == plain


def test_long_prompt_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than one prefill block gives what one block gives."""
    prompt = [(7 * i + i * i) % VOCAB for i in range(300)]
    for family in ("llama", "gemma3"):
        model = make(family)
        _, whole = generate(model, prompt, max_tokens=20, draft="3x4")
        monkeypatch.setattr(decode.prefill, "__defaults__", (64,))
        _, blocks = generate(model, prompt, max_tokens=20, draft="3x4")
        monkeypatch.undo()
        assert blocks.token_ids == whole.token_ids


def test_a_prefills_buffers_are_freed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the blocks' freed arrays, which no later one fits, would stay in MLX's cache until the text is done."""
    model, freed = make(), list[int]()
    monkeypatch.setattr(mx, "clear_cache", lambda: freed.append(1))
    cache, prompt = model.target.new_cache(), [index % VOCAB for index in range(decode.SHORT_PROMPT + 20)]
    text = Text(model.target, None, cache, Off(), Sampling(), prompt, max_tokens=1)
    prefill(model.target, text, prompt, block=16)
    assert len(freed) == -(-(len(prompt) - 1) // 16)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """How often Python waits for MLX's device in a call, counted round MLX itself."""
    counted = [0]

    def counting(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            counted[0] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (mx, "eval"), (mx, "synchronize"), (mx.array, "item"), (mx.array, "tolist"), (mx.array, "__bool__"),
        (mx.array, "__int__"), (mx.array, "__float__"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))

    def count(run: Callable[[], object]) -> int:
        counted[0] = 0
        run()
        return counted[0]

    return count


Waits = Callable[[Callable[[], object]], int]


def test_waits_are_counted(waits: Waits) -> None:
    x = mx.zeros((2,))
    assert waits(lambda: (x + 1).tolist()) == 1
    assert waits(lambda: mx.eval(x + 1)) == 1
    assert waits(lambda: (x[0] + 1).item()) == 1
    assert waits(lambda: x + 1) == 0


@pytest.mark.parametrize("draft", ["off", "1x4", "4x3@5", "8x5@16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_wait_per_step(draft: str, setting: str, waits: Waits) -> None:
    """Once the first step has built what later ones share."""
    model = make("llama")
    cache = model.target.new_cache()
    policy = Off() if draft == "off" else Fixed(Beam.parse(draft))
    text = Text(model.target, model.drafter, cache, policy, SETTINGS[setting], PROMPT, max_tokens=200)
    prefill(model.target, text, PROMPT)
    step(model.target, [text])
    for _ in range(6):
        assert waits(lambda: step(model.target, [text])) == 1


def test_several_texts_in_one_step() -> None:
    """Texts of different lengths, policies and seeds beside each other say what each says alone."""
    model = make("llama")
    prompts = [PROMPT, [1, 2], [9, 8, 7, 6, 5, 4, 3]]
    policies = [Fixed(Beam(3, 4)), Off(), Fixed(Beam(1, 3))]
    settings = [Sampling(), Sampling(temperature=1.0, seed=4), Sampling(temperature=0.5, seed=9)]
    texts, said = [], []
    for prompt, policy, sampling in zip(prompts, policies, settings, strict=True):
        text = Text(model.target, model.drafter, model.target.new_cache(), policy, sampling, prompt)
        said.append([prefill(model.target, text, prompt)])
        texts.append(text)
    for _ in range(20):
        for mine, gained in zip(said, step(model.target, texts), strict=True):
            mine += gained
    for prompt, sampling, tokens in zip(prompts, settings, said, strict=True):
        _, stats = generate(model, prompt, max_tokens=len(tokens), sampling=sampling, draft="off")
        assert stats.token_ids == tokens


@pytest.mark.parametrize(
    "draft", ["3x4", *(pytest.param(each, marks=slow) for each in ("off", *DRAFTS) if each != "3x4")]
)
def test_an_end_inside_an_accepted_path_ends_the_text(draft: str) -> None:
    """Whatever token of the plain text is made the end, nothing follows it, and the steps count what was emitted."""
    model = right_now_and_then("llama")
    plain = run(model, "off", Sampling(), 40)
    for end in dict.fromkeys(plain):
        model.eos_token_ids = frozenset([end])
        _, stats = generate(model, PROMPT, max_tokens=40, draft=draft)
        assert stats.token_ids == plain[: plain.index(end) + 1] and stats.finish_reason == "stop"
        assert stats.decoded_tokens == stats.generated_tokens - 1


@pytest.mark.slow
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
