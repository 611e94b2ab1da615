"""Batched decoding by the target itself: the text a drafter learns from.

All rows of a batch decode in lockstep, aligned at their first token, so no padding and no mask is needed: a row whose
prompt is longer than the others' is fed the rest of its prompt while the others already generate. Rows that have ended
leave the batch. The hidden states cost nothing extra: they are recorded as the text is generated.

Letters: B rows, V vocabulary, C context size (see `redrafter_mlx.drafters.interface`), n tokens generated in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.target import Target

WINDOW, REPEATS = 8, 12
PREFILL_TOKENS = 2048  # upper bound for one forward, which bounds the memory of its logits


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt to continue, and how."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_k: int = 0
    """0: the whole vocabulary."""


@dataclass(slots=True)
class Answer:
    """What the target generated after a prompt: `contexts[j]` is the state in which it chose `tokens[j]`."""

    tokens: list[int] = field(default_factory=list)
    """n tokens; the last one is the stop token if the answer ended with one"""
    contexts: list[np.ndarray] = field(default_factory=list)
    """n arrays (C,) float16; empty if they were not requested"""
    stopped: bool = False
    """True if the answer ended with a stop token, not by its length or in a loop."""


class LoopWatch:
    """Detects a text that repeats itself: 12 windows of 8 tokens in a row that all occurred before.

    Small models that decode greedily soon do this, and a drafter trained on such text would learn little else.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._last: list[int] = []
        self._run = 0

    def push(self, token: int) -> bool:
        """Add a token; True once the text loops."""
        self._last = [*self._last[-(WINDOW - 1) :], token]
        if len(self._last) == WINDOW:
            window = tuple(self._last)
            self._run = self._run + 1 if window in self._seen else 0
            self._seen.add(window)
        return self._run >= REPEATS


def loop_start(tokens: Sequence[int]) -> int:
    """How many tokens of a text to keep: all, or those up to the one with which it is found to loop."""
    watch = LoopWatch()
    for index, token in enumerate(tokens):
        if watch.push(token):
            return index + 1
    return len(tokens)


def sample(logits: np.ndarray, temperatures: np.ndarray, top_k: int, uniforms: np.ndarray) -> np.ndarray:
    """Draw one token per row by inverting the cumulative distribution; at temperature 0 take the most likely one.

    Args:
        logits: (B, V) float32.
        temperatures: (B,).
        top_k: draw from the k most likely tokens only; 0 for all.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64.
    """
    tokens = logits.argmax(axis=-1)
    rows = np.flatnonzero(temperatures > 0)
    if not len(rows):
        return tokens
    drawn = logits[rows] / temperatures[rows, None].astype(np.float32)
    if 0 < top_k < drawn.shape[-1]:
        kth = np.partition(drawn, -top_k, axis=-1)[:, -top_k, None]
        drawn[drawn < kth] = -np.inf
    drawn = np.exp(drawn - drawn.max(axis=-1, keepdims=True))
    total = drawn.cumsum(axis=-1, dtype=np.float64)
    tokens[rows] = (total > uniforms[rows, None] * total[:, -1:]).argmax(axis=-1)
    return tokens


class _Batch:
    """Rows that decode in lockstep: their KV cache, and which of them are still in it."""

    def __init__(self, target: Target, rows: Sequence[Row]) -> None:
        self.target = target
        self.cache = make_prompt_cache(target.model)
        self.rows = rows
        self.alive = list(range(len(rows)))

    def start(self) -> tuple[mx.array, mx.array, int]:
        """Prefill up to the length of the shortest prompt. Returns logits (B, V), contexts (B, C) and that length."""
        prompts = [row.prompt for row in self.rows]
        shortest = min(len(p) for p in prompts)
        shared = 0
        while shared < shortest - 1 and len({p[shared] for p in prompts}) == 1:
            shared += 1
        if shared:  # one row computes the common beginning (the system prompt) for all
            mx.eval(self.target.model(mx.array([prompts[0][:shared]]), cache=self.cache))
            self._map(lambda a: mx.repeat(a, len(prompts), axis=0))
        block = max(1, PREFILL_TOKENS // len(prompts))
        for begin in range(shared, shortest, block):
            tokens = mx.array([p[begin : min(begin + block, shortest)] for p in prompts])
            logits, contexts = self.forward(tokens)
        return logits, contexts, shortest

    def forward(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """tokens (B, T) -> logits (B, V) and contexts (B, C) of the last token of each row."""
        all_logits, all_contexts = self.target.forward(tokens, self.cache)
        logits, contexts = all_logits[:, -1].astype(mx.float32), all_contexts[:, -1].astype(mx.float16)
        mx.eval(logits, contexts)
        return logits, contexts

    def keep(self, slots: list[int]) -> None:
        """Keep only these rows of the batch."""
        index = mx.array(slots)
        self._map(lambda a: a[index])
        self.alive = [self.alive[slot] for slot in slots]

    def _map(self, function: Callable[[mx.array], mx.array]) -> None:
        def on_rows(leaf: Any) -> Any:  # the state of a cache also holds its offset, which all rows share
            return function(leaf) if isinstance(leaf, mx.array) and leaf.ndim else leaf

        for layer in self.cache:
            layer.state = tree_map(on_rows, layer.state)
            mx.eval(layer.state)


def generate_batch(  # noqa: PLR0913  (three by keyword)
    target: Target,
    rows: Sequence[Row],
    stop: frozenset[int],
    rng: np.random.Generator,
    with_contexts: bool = True,
    on_step: Callable[[int], None] | None = None,
    cut_loops: bool = True,
) -> list[Answer]:
    """Continue every row until a stop token, its maximum length or, with `cut_loops`, until it repeats itself.

    Args:
        stop: token ids that end a text.
        rng: draws one uniform number per row and position, also for rows that have ended, so that the text of a row
            does not depend on when the others end.
        with_contexts: also record the contexts.
        on_step: called after every step with the number of tokens it generated.
    """
    if len({row.top_k for row in rows}) > 1:
        raise ValueError("top_k must be the same for all rows of a batch")
    batch = _Batch(target, rows)
    written = [Answer() for _ in rows]
    watches = [LoopWatch() for _ in rows]
    done = [False] * len(rows)
    temperatures = np.array([row.temperature for row in rows])
    logits, contexts, position = batch.start()
    while True:
        alive = np.array(batch.alive)
        uniforms = rng.random(len(rows))[alive]
        tokens = sample(np.array(logits), temperatures[alive], rows[0].top_k, uniforms)
        noted = np.array(contexts) if with_contexts else None
        count = 0
        for slot, index in enumerate(batch.alive):
            prompt, text = rows[index].prompt, written[index]
            if done[index]:
                continue
            if position < len(prompt):
                tokens[slot] = prompt[position]
                continue
            token = int(tokens[slot])
            text.tokens.append(token)
            if noted is not None:
                text.contexts.append(noted[slot].copy())
            count += 1
            text.stopped = token in stop
            looped = cut_loops and watches[index].push(token)
            done[index] = text.stopped or looped or len(text.tokens) >= rows[index].max_tokens
        if on_step is not None:
            on_step(count)
        slots = [slot for slot, index in enumerate(batch.alive) if not done[index]]
        if not slots:
            return written
        # moving the cache takes about as long as a step, so it is not done each time
        if len(slots) <= len(batch.alive) * 7 // 8:
            batch.keep(slots)
            tokens = tokens[slots]
        logits, contexts = batch.forward(mx.array(tokens)[:, None])
        position += 1
