"""Generation for programs that must not wait: asynchronous streams, and many prompts one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .generation import Chunk, generate, stream_generate
from .model import Model
from .prompt_cache import PromptCache
from .prompts import Prompt
from .sampling import Sampling
from .stats import Stats
from .tree import Beam

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Keywords(TypedDict, total=False):
        """What `stream_generate` takes by keyword."""

        max_tokens: int
        sampling: Sampling | None
        draft: str | Beam
        stop: Sequence[str] | None
        raw: bool
        cache: PromptCache | None
        kv_bits: int | None


async def astream_generate(
    model: Model, prompt: Prompt, **options: Unpack[Keywords]
) -> AsyncGenerator[Chunk, None]:
    """`stream_generate` without blocking the event loop: the stream is read in a thread of its own.

    Cancelling the task, or closing the generator, ends the generation with the step that is under way. Streams of one
    model take turns step by step.

    Args:
        options: as `stream_generate` has them.

    Raises:
        ValueError: as `stream_generate`, with the first chunk.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="redrafter") as thread:
        stream = await loop.run_in_executor(thread, lambda: stream_generate(model, prompt, **options))
        try:
            while (chunk := await loop.run_in_executor(thread, next, stream, None)) is not None:
                yield chunk
        finally:
            thread.submit(stream.close)  # type: ignore[attr-defined]


def batch(
    model: Model, prompts: Iterable[Prompt], **options: Unpack[Keywords]
) -> Iterator[tuple[str, Stats]]:
    """Text and figures of every prompt, one after the other.

    Args:
        options: as `generate` has them, the same for all; a `cache` is of use where prompts begin alike.

    Raises:
        ValueError: as `generate`, when it is the prompt's turn.
    """
    for prompt in prompts:
        yield generate(model, prompt, **options)
