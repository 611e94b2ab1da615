"""The public functions: prompt caches, ends, stop strings, threads, and what is refused before any work."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.toy import VOCAB, make, make_often_right, make_target, save_folder

# isort: split
import mlx.core as mx

import redrafter_mlx as rd
from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.sampling import Sampling

PROMPT = [5, 9, 33, 2, 17]


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


def test_a_cache_serves_one_model() -> None:
    cache = PromptCache()
    generate(make("llama"), PROMPT, max_tokens=4, cache=cache)
    with pytest.raises(ValueError, match="cache belongs to tiny-llama, and cannot serve tiny-qwen2"):
        generate(make("qwen2"), PROMPT, max_tokens=4, cache=cache)


def test_a_cache_serves_one_stream_at_a_time() -> None:
    """A second live stream would take back positions that the first one stands on."""
    model, cache = make("llama"), PromptCache()
    first = stream_generate(model, PROMPT, max_tokens=20, cache=cache)
    waiting = stream_generate(model, [4, 4, 4], max_tokens=5, cache=cache)  # not begun, so not in the way
    said = [next(first).token for _ in range(5)]
    with pytest.raises(ValueError, match="cache is in use by another stream"):
        stream_generate(model, [1, 2, 3], max_tokens=5, cache=cache)
    with pytest.raises(ValueError, match="cache is in use by another stream"):
        next(waiting)
    said += [chunk.token for chunk in first]
    assert said == generate(model, PROMPT, max_tokens=20, draft="off")[1].token_ids
    assert generate(model, [1, 2, 3], max_tokens=5, cache=cache)[1].generated_tokens == 5


def test_streams_of_one_model_interleave() -> None:
    model = make("llama")
    prompts = [PROMPT, [1, 2, 3], [40, 41]]
    alone = [generate(model, prompt, max_tokens=20, draft="3x4")[1].token_ids for prompt in prompts]
    streams = [stream_generate(model, prompt, max_tokens=20, draft="3x4") for prompt in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    for _ in range(20):
        for mine, stream in zip(said, streams, strict=True):
            mine.append(next(stream).token)
    assert said == alone


@pytest.mark.parametrize("draft", ["off", "3x4", "2x3@4"])
def test_threads_take_turns_and_say_the_same(draft: str) -> None:
    """A model made in this thread, used by others at the same time."""
    model = make("llama")
    sampling = Sampling(temperature=0.8, seed=2)
    prompts = [[1 + index, 2, 3] for index in range(4)]
    found: dict[int, list[int]] = {}
    failed: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(3):
                _, stats = generate(model, prompts[index], max_tokens=12, sampling=sampling, draft=draft)
                found[index] = stats.token_ids
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    for index, prompt in enumerate(prompts):
        _, stats = generate(model, prompt, max_tokens=12, sampling=sampling, draft="off")
        assert found[index] == stats.token_ids


def test_a_stream_stays_in_its_thread() -> None:
    stream = stream_generate(make("llama"), PROMPT, max_tokens=20)
    next(stream)
    errors: list[str] = []

    def work() -> None:
        try:
            for _ in stream:
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == ["a stream must be read in one thread: the one in which its first chunk was"]


def test_each_turn_in_a_thread_of_its_own() -> None:
    """Rows that a turn's last step accepted out of order are moved for the next turn, whichever thread has that."""
    target = make_target()
    model = Model(target, make_often_right(target))
    for count in range(2, 9):
        cache, prompt, found = PromptCache(), list(PROMPT), list[list[int]]()

        def turn(count: int, cache: PromptCache, prompt: list[int], found: list[list[int]]) -> None:
            found.append(generate(model, prompt, max_tokens=count, draft="8x4@16", cache=cache)[1].token_ids)

        for _ in range(2):
            thread = threading.Thread(target=turn, args=(count, cache, list(prompt), found))
            thread.start()
            thread.join()
            plain = generate(model, prompt, max_tokens=count, draft="off")[1].token_ids
            assert found.pop() == plain, count
            prompt += plain


def test_a_stream_closed_in_another_thread_leaves_a_cache_that_serves() -> None:
    target = make_target()
    model = Model(target, make_often_right(target))
    want = generate(model, PROMPT, max_tokens=20, draft="off")[1].token_ids
    for count in range(1, 8):
        cache = PromptCache()
        stream = stream_generate(model, PROMPT, max_tokens=20, draft="8x4@16", cache=cache)
        tokens = [next(stream).token for _ in range(count)]
        thread = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
        thread.start()
        thread.join()
        _, stats = generate(model, PROMPT + tokens, max_tokens=20 - count, draft="8x4@16", cache=cache)
        assert tokens + stats.token_ids == want, count


def test_a_target_without_a_tokenizer_ends_at_its_configs_end() -> None:
    model = make("llama")
    plain = generate(model, PROMPT, max_tokens=30, draft="off")[1].token_ids
    model.eos_token_ids = frozenset([plain[7]])
    _, stats = generate(model, PROMPT, max_tokens=30, draft="3x4")
    assert stats.token_ids == plain[: plain.index(plain[7]) + 1] and stats.finish_reason == "stop"


def test_weights_stay_resident_on_metal_while_a_text_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in mlx-lm: else a model near the size of the working set would be read from memory anew at every step."""
    events: list[object] = []

    @contextmanager
    def wired(module: object) -> Iterator[None]:
        events.append(module)
        yield
        events.append("released")

    model = make()
    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "wired_limit", wired)
    assert len(list(stream_generate(model, [1, 2], max_tokens=4, draft="3x4"))) == 4 and not events
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for count, _ in enumerate(stream_generate(model, [1, 2], max_tokens=4, draft="3x4"), 1):
        assert len(events) == 1 and events[0] is model.target.model, f"resident with chunk {count}"
    assert events[1:] == ["released"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return rd.load(save_folder(tmp_path_factory.mktemp("talker")))


@pytest.mark.parametrize("draft", ["off", "3x4"])
def test_a_stop_string_ends_the_text(talker: Model, draft: str) -> None:
    whole, _ = generate(talker, "hello", max_tokens=40, draft="off")
    for begin in (0, 3, len(whole) // 2):
        stop = whole[begin : begin + 2]
        text, stats = generate(talker, "hello", max_tokens=40, draft=draft, stop=[stop])
        assert text == whole[: whole.index(stop)] and stats.finish_reason == "stop"


def test_chunks_say_what_was_drafted(talker: Model) -> None:
    chunks = list(stream_generate(talker, "hello", max_tokens=40, draft="3x4"))
    stats = chunks[-1].stats
    assert sum(chunk.from_draft for chunk in chunks) >= stats.accepted_tokens - 1
    assert not chunks[0].from_draft
    assert [chunk.token for chunk in chunks] == stats.token_ids


def test_the_consumers_time_is_not_the_models() -> None:
    """Decoding is timed step by step: what happens between two chunks is somebody else's."""
    import time

    model = make("llama")
    generate(model, PROMPT, max_tokens=10, draft="off")
    begun, seconds = time.perf_counter(), 0.0
    for chunk in stream_generate(model, PROMPT, max_tokens=10, draft="off"):
        time.sleep(0.05)
        seconds = chunk.stats.decode_seconds
    assert seconds < (time.perf_counter() - begun) - 10 * 0.05 + 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer, 1 or more, not 0"),
        ({"max_tokens": 600}, "more than the context of 512"),
        ({"draft": "3y4"}, "draft must be auto, off"),
        ({"draft": "3x1"}, "length >= 2"),
        ({"draft": "100x5@8"}, "beam width must be at most"),
        ({"stop": ["x"]}, "need a tokenizer"),
        ({"kv_bits": 7}, "kv_bits must be"),
        ({"stop": "x"}, "stop must be a list of strings, not one string"),
        ({"stop": [""]}, "stop must be a list of strings that are not empty"),
        ({"stop": [2]}, "stop must be a list of strings"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"max_tokens": 4.0}, "max_tokens must be an integer"),
        ({"draft": 3}, "draft must be"),
        ({"sampling": 0.7}, "sampling must be a Sampling"),
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
