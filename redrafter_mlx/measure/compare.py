"""Comparing ways to generate: every arm on every prompt in turn, in one process, with the same weights.

An arm is one way to generate; nothing else differs between arms. The order of the arms rotates from prompt to prompt,
so that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.generation import Model, encode, generate
from redrafter_mlx.prompts import Request
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.stats import Stats

MT_BENCH = Path(__file__).parent.parent / "assets" / "mt_bench.jsonl"


@dataclass(frozen=True, slots=True)
class Run:
    """One arm on one prompt."""

    token_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    stats: Stats | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding alone, the first token belonging to the prefill."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


Arm = Callable[[list[int]], Run]


@dataclass(slots=True)
class Comparison:
    """All arms on all prompts: name -> a run per prompt."""

    categories: list[str]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def rate(self, arm: str) -> tuple[float, float, float]:
        """Tokens per second of a prompt: first quartile, median, third quartile."""
        return quartiles([run.tokens_per_second for run in self.runs[arm]])

    def ratio(self, arm: str, base: str, category: str | None = None) -> tuple[float, float, float]:
        """Quartiles of the speed of one arm over another's, prompt by prompt."""
        pairs = zip(self.categories, self.runs[arm], self.runs[base], strict=True)
        return quartiles(
            [
                a.tokens_per_second / b.tokens_per_second
                for name, a, b in pairs
                if (category is None or name == category) and b.tokens_per_second
            ]
        )

    def total(self, arm: str) -> float:
        """Tokens per second of all prompts together."""
        runs = self.runs[arm]
        seconds = sum(run.decode_seconds for run in runs)
        return sum(len(run.token_ids) - 1 for run in runs) / seconds if seconds else 0.0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        value = values[0] if values else 0.0
        return value, value, value
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def own_arm(model: Model, draft: str, max_tokens: int, sampling: Sampling) -> Arm:
    """This project's own decoding."""

    def run(prompt: list[int]) -> Run:
        _, stats = generate(model, prompt, max_tokens=max_tokens, sampling=sampling, draft=draft)
        return Run(stats.token_ids, stats.prefill_seconds, stats.decode_seconds, stats)

    return run


def mlx_lm_arm(
    model: Model, max_tokens: int, sampling: Sampling, draft_model: nn.Module | None = None
) -> Arm:
    """mlx-lm's `stream_generate` on the same weights; with `draft_model` its speculative decoding."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.target.name} has no tokenizer, and mlx-lm's stream_generate needs one")
    sampler = make_sampler(
        temp=sampling.temperature,
        top_p=max(sampling.top_p, 1e-9) % 1,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
    )

    def run(prompt: list[int]) -> Run:
        mx.random.seed(sampling.seed or 0)
        tokens, begun, first = [], time.perf_counter(), 0.0
        for response in stream_generate(
            model.target.model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler,
            draft_model=draft_model,
        ):  # fmt: skip
            tokens.append(int(response.token))
            first = first or time.perf_counter()
        return Run(tokens, first - begun, time.perf_counter() - first)

    return run


def compare(
    arms: dict[str, Arm], prompts: Sequence[list[int]], categories: Sequence[str], warmup: int = 1
) -> Iterator[Comparison]:
    """Run every arm on every prompt, interleaved; yields the comparison so far after each prompt."""
    for arm in arms.values():
        for prompt in prompts[:warmup]:
            arm(prompt)
    result = Comparison([], {name: [] for name in arms})
    names = list(arms)
    for index, prompt in enumerate(prompts):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            result.runs[name].append(arms[name](prompt))
        result.categories.append(categories[index])
        yield result


def spread(requests: Sequence[Request], limit: int | None) -> list[Request]:
    """At most `limit` requests, taken evenly from the whole list, so that every category is kept."""
    if limit is None or limit >= len(requests):
        return list(requests)
    return [requests[index * len(requests) // limit] for index in range(limit)]


def encoded(model: Model, requests: Sequence[Request], context: int | None) -> list[list[int]]:
    """Token ids of every prompt, lengthened to about `context` tokens by other prompts' text before its last message.

    Raises:
        ValueError: `context` is given and the model has no tokenizer.
    """
    prompts = [encode(model, request.prompt) for request in requests]
    if context is None:
        return prompts
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"--context needs a tokenizer, and {model.target.name} has none")
    text = "\n\n".join(request.messages(None)[-1]["content"] for request in requests)
    filler = tokenizer.encode(text, add_special_tokens=False)
    filler = filler * (1 + context // len(filler))
    out = []
    for request, prompt in zip(requests, prompts, strict=True):
        *earlier, last = request.messages(None)
        before = tokenizer.decode(filler[: max(0, context - len(prompt))])
        longer = {**last, "content": f"{before}\n\n{last['content']}"}
        out.append(encode(model, [*earlier, longer]) if before else prompt)
    return out
