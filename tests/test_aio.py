"""Asynchronous streams and many prompts: the same texts as one after the other, and a stream that is left ends."""

from __future__ import annotations

import asyncio

import pytest

from tests.toy import make_often_right, make_target

# isort: split
from redrafter_mlx.aio import astream_generate, batch
from redrafter_mlx.generation import PromptCache, generate
from redrafter_mlx.model import Model
from redrafter_mlx.sampling import Sampling


@pytest.fixture(scope="module")
def model() -> Model:
    target = make_target()
    return Model(target, make_often_right(target))


def test_concurrent_streams_are_the_serial_ones(model: Model) -> None:
    prompts = [[3, 4, 5], [9, 8], [7]]

    async def read(prompt: list[int], seed: int) -> list[int]:
        sampling = Sampling(temperature=0.8, seed=seed)
        stream = astream_generate(model, prompt, max_tokens=30, sampling=sampling, draft="2x3@4")
        return [chunk.token async for chunk in stream]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(read(prompt, seed) for seed, prompt in enumerate(prompts)))

    found = asyncio.run(all_of_them())
    for seed, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        sampling = Sampling(temperature=0.8, seed=seed)
        assert generate(model, prompt, max_tokens=30, sampling=sampling, draft="off")[1].token_ids == tokens


def test_the_loop_goes_on_meanwhile(model: Model) -> None:
    async def main() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(beat())
        async for _ in astream_generate(model, [3, 4, 5], max_tokens=20, draft="2x3@4"):
            pass
        task.cancel()
        return beats

    assert asyncio.run(main()) > 20


def test_a_stream_that_is_left_frees_its_cache(model: Model) -> None:
    cache = PromptCache()

    async def main() -> None:
        stream = astream_generate(model, [3, 4, 5], max_tokens=400, draft="2x3@4", cache=cache)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(main())
    assert not cache.in_use
    _, stats = generate(model, [3, 4, 5, 6], max_tokens=4, cache=cache, draft="2x3@4")
    assert stats.generated_tokens == 4


def test_a_mistake_is_raised_with_the_first_chunk(model: Model) -> None:
    async def main() -> None:
        async for _ in astream_generate(model, [3], max_tokens=0):
            raise AssertionError("nothing can come")

    with pytest.raises(ValueError, match="max_tokens"):
        asyncio.run(main())


def test_batch_is_generate_for_each(model: Model) -> None:
    prompts = [[3, 4, 5], [9, 8]]
    found = [stats.token_ids for _, stats in batch(model, prompts, max_tokens=12, draft="2x3@4")]
    assert found == [generate(model, p, max_tokens=12, draft="off")[1].token_ids for p in prompts]
