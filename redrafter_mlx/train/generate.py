"""Batched decoding by the target itself: the text a drafter learns from.

All rows of a batch decode in lockstep, aligned at their first token, so no padding and no mask is needed: a row whose
prompt is longer than the others' is fed the rest of its prompt while the others already generate. Rows that have ended
leave the batch. The hidden states cost nothing extra: they are recorded as the text is generated.

A batch that is interrupted leaves its answers in a `Journal`, and the same call goes on from there: what an answer has
so far is fed as if it were part of its prompt, and the random numbers spent on it are skipped.

Letters: B rows, V vocabulary, C context size (see `redrafter_mlx.drafters.interface`), n tokens generated in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.target import Target

from .journal import Journal
from .rows import Answer as Answer
from .rows import Row as Row
from .rows import Writing

PREFILL_TOKENS = 2048  # upper bound for one forward, which bounds the memory of its logits


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Control:
    """How a batch is watched, ended early and kept."""

    on_step: Callable[[int, int], None] | None = None
    """Called after every step with the number of tokens it generated and the number of answers that have ended."""
    is_over: Callable[[], bool] = _never
    """Asked after every step: True ends all answers where they are."""
    journal: Journal | None = None
    """Keeps what is written when the batch is interrupted, and continues it."""


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
    """Texts that decode in lockstep: their KV cache, and which of them are still in it."""

    def __init__(self, target: Target, texts: Sequence[Writing]) -> None:
        self.target = target
        self.cache = make_prompt_cache(target.model)
        self.alive = [index for index, text in enumerate(texts) if not text.is_done]
        self._begun = [texts[index].tokens for index in self.alive]

    def start(self) -> tuple[mx.array, mx.array, int]:
        """Prefill up to the length of the shortest text. Returns logits (B, V), contexts (B, C) and that length."""
        begun = self._begun
        shortest = min(map(len, begun))
        shared = 0
        while shared < shortest - 1 and len({tokens[shared] for tokens in begun}) == 1:
            shared += 1
        if shared:  # one row computes the common beginning (the system prompt) for all
            mx.eval(self.target.model(mx.array([begun[0][:shared]]), cache=self.cache))
            self._map(lambda a: mx.repeat(a, len(begun), axis=0))
        block = max(1, PREFILL_TOKENS // len(begun))
        for begin in range(shared, shortest, block):
            tokens = mx.array([text[begin : min(begin + block, shortest)] for text in begun])
            logits, contexts = self.forward(tokens)
        return logits, contexts, shortest

    def forced(self, slot: int, position: int) -> int | None:
        """The token that a text begins with at a position; None where it is to be chosen."""
        begun = self._begun[slot]
        return begun[position] if position < len(begun) else None

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
        self._begun = [self._begun[slot] for slot in slots]

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
    cut_loops: bool = True,
    control: Control | None = None,
) -> list[Answer]:
    """Continue every row until a stop token, its maximum length or, with `cut_loops`, until it repeats itself.

    Args:
        stop: token ids that end a text.
        rng: draws one uniform number per row and position, also for rows that have ended, so that the text of a row
            does not depend on when the others end.
        with_contexts: also record the contexts.
    """
    if len({row.top_k for row in rows}) > 1:
        raise ValueError("top_k must be the same for all rows of a batch")
    control = control or Control()
    journal = control.journal
    begun = None if journal is None else journal.load(rows)
    texts = [Writing(row, stop, cut_loops, None if begun is None else begun[i]) for i, row in enumerate(rows)]
    try:
        _write(target, texts, rng, with_contexts, control)
    except BaseException:  # Ctrl-C above all
        if journal is not None and any(text.answer.tokens for text in texts):
            journal.save(rows, [text.answer for text in texts])
        raise
    return [text.answer for text in texts]


def _write(
    target: Target, texts: list[Writing], rng: np.random.Generator, with_contexts: bool, control: Control
) -> None:
    """The steps of a batch, from where its texts are to their ends."""
    rows = [text.row for text in texts]
    first = min(len(row.prompt) for row in rows)
    if all(text.is_done for text in texts):
        rng.random((max(len(text.tokens) for text in texts) - first, len(rows)))
        return
    batch = _Batch(target, texts)
    temperatures = np.array([row.temperature for row in rows])
    logits, contexts, position = batch.start()
    rng.random((position - first, len(rows)))
    while True:
        alive = np.array(batch.alive)
        uniforms = rng.random(len(rows))[alive]
        tokens = sample(np.array(logits), temperatures[alive], rows[0].top_k, uniforms)
        noted = np.array(contexts) if with_contexts else None
        count = 0
        for slot, index in enumerate(batch.alive):
            forced = batch.forced(slot, position)
            if forced is not None:
                tokens[slot] = forced
            elif not texts[index].is_done:
                texts[index].push(int(tokens[slot]), None if noted is None else noted[slot].copy())
                count += 1
        if control.on_step is not None:
            control.on_step(count, sum(text.is_done for text in texts))
        slots = [slot for slot, index in enumerate(batch.alive) if not texts[index].is_done]
        if not slots or control.is_over():
            return
        # moving the cache takes about as long as a step, so it is not done each time
        if len(slots) <= len(batch.alive) * 7 // 8:
            batch.keep(slots)
            tokens = tokens[slots]
        if control.journal is not None:
            control.journal.save_if_due(rows, [text.answer for text in texts])
        logits, contexts = batch.forward(mx.array(tokens)[:, None])
        position += 1


def states(
    target: Target,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    on_step: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Compute the contexts in which the target would have chosen the tokens of these answers, in large batches.

    The rows of a batch have similar lengths and are padded behind their end, which a causal model does not see.

    Args:
        on_step: called after every batch with its number of tokens and the number of answers done.
    """
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    out = [Answer()] * len(order)
    while order:
        longest = lengths[order[-1]]
        count = max(1, 2 * PREFILL_TOKENS // longest)
        order, chosen = order[:-count], order[-count:]
        rows = np.zeros((len(chosen), longest), dtype=np.int32)
        for row, index in zip(rows, chosen, strict=True):
            row[: lengths[index]] = prompts[index] + answers[index]
        contexts = np.array(target.contexts(mx.array(rows)).astype(mx.float16))
        for context, index in zip(contexts, chosen, strict=True):
            begin = len(prompts[index]) - 1  # the state before an answer's first token is its prompt's last
            own = context[begin : begin + len(answers[index])]
            out[index] = Answer(list(answers[index]), list(own))
        if on_step is not None:
            on_step(sum(len(answers[index]) for index in chosen), len(lengths) - len(order))
    return out


ROUNDING = 0.05
"""Of the logits' deviation, by which a context in float16 may let another token pass the most likely one."""


def is_greedy(answer: Answer, rows: mx.array) -> bool:
    """True if every token was the most likely one in its context, up to rounding.

    Args:
        answer: with contexts.
        rows: (V, H) of the target's output embedding.
    """
    hidden = mx.array(np.stack(answer.contexts))[:, : rows.shape[1]].astype(rows.dtype)
    logits = hidden @ rows.T  # (n, V)
    chosen = mx.take_along_axis(logits, mx.array(answer.tokens)[:, None], axis=-1)
    gap = logits.max(axis=-1, keepdims=True) - chosen
    return bool(mx.all(gap <= ROUNDING * mx.std(logits, axis=-1, keepdims=True)).item())
