"""Profiling a decode step: milliseconds of each stage, operations, bytes."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import mlx.core as mx

from redrafter_mlx.decode import Text, prefill
from redrafter_mlx.files import weight_bytes
from redrafter_mlx.generation import Model, make_policy
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import MAX_NODES

STAGES = ("draft", "verify", "accept", "keep", "host")


class _TimedText(Text):
    """A text that waits after each stage to time it, and is therefore slower than a real one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._since = time.perf_counter()

    def end(self, stage: str, arrays: Sequence[mx.array]) -> None:
        """Wait for what a stage has queued; the time to build its graph counts as the host's."""
        built = time.perf_counter()
        mx.eval(arrays)
        now = time.perf_counter()
        self.seconds["host"] += built - self._since
        self.seconds[stage] += now - built
        self._since = now

    def queue_draft(self, position: mx.array, low: int, slack: int = 0, unread: int = 0) -> None:
        self.end("accept", [*self.output, self.root, self.context])
        super().queue_draft(position, low, slack, unread)
        self.end("draft", self.offers.output)

    def keep(self, path: list[int]) -> None:
        super().keep(path)
        self.end("keep", self.cache.arrays())


def profile(
    model: Model, prompt: list[int], draft: str, max_tokens: int, sampling: Sampling
) -> dict[str, float]:
    """Milliseconds per step of each stage. Stages do not overlap here, so that their sum exceeds a real step."""
    target, cache = model.target, model.target.new_cache()
    cache.reserve(len(prompt) + max_tokens + MAX_NODES)
    policy = make_policy(model, draft, sampling.is_greedy)
    text = _TimedText(target, model.drafter, cache, policy, sampling, prompt, max_tokens=max_tokens)
    prefill(target, text, prompt)
    text.seconds = dict.fromkeys(STAGES, 0.0)
    while text.needs_step:
        verified = target.verify(text.tree(), cache)
        text.end("verify", [verified.contexts, verified.logits])
        text.accept(verified)
        text.commit()
    text.flush()
    return {stage: 1000 * seconds / text.stats.steps for stage, seconds in text.seconds.items()}


def ops_per_step(model: Model, prompt: list[int], draft: str, sampling: Sampling) -> int:
    """Number of operations in the lazy graph of one decode step, as `mx.export_to_dot` lists them."""
    target, cache = model.target, model.target.new_cache()
    policy = make_policy(model, draft, sampling.is_greedy)
    text = Text(target, model.drafter, cache, policy, sampling, prompt, max_tokens=1)  # none launched ahead
    prefill(target, text, prompt)
    mx.eval(text.root, text.context, text.offers.output, cache.arrays())
    with mock.patch.object(
        mx, "async_eval", lambda *arrays: None
    ):  # else the graph is gone before it is counted
        text.accept(target.verify(text.tree(), cache))
    graph = io.StringIO()
    mx.export_to_dot(graph, *text.output, *text.offers.output)
    mx.eval(text.output)
    return graph.getvalue().count("shape=rectangle")


def bytes_per_step(model: Model, beam_length: int) -> dict[str, int]:
    """Bytes of weights a decode step reads: the target once, the drafter once per level.

    An embedding that is only looked up is not counted; one that is the output head too is.
    """
    target = model.target
    total = weight_bytes(target.model)
    if target.has_own_head:
        total -= weight_bytes(target.embedding)
    out = {"target": total, "drafter": 0}
    if model.drafter is not None and beam_length > 1:
        out["drafter"] = (beam_length - 1) * model.drafter.nbytes
    return out
