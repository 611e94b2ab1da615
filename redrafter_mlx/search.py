"""Beam search through the drafter, on the device: levels of W tokens, no host work in between.

The target draws its token at position p as argmax(log p + gumbel(seed, p)). The drafter adds the same noise
to its own logits, so that it guesses what the target will draw and not what is likely on average: scores =
log softmax((logits / c + T gumbel) / tau), c the depth's calibration, tau = 1 at T = 0 (docs/algorithm.md, "Sampling").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .topk import top_k
from .tree import Levels

if TYPE_CHECKING:
    from .drafter import Embed, RecurrentDrafter

SAMPLING_TAU = 1.15  # softens the noisy scores; how it was found: docs/algorithm.md, "Sampling"


def search(  # noqa: PLR0913  (four by keyword)
    drafter: RecurrentDrafter,
    context: mx.array,
    root: mx.array,
    embed: Embed,
    *,
    width: int,
    length: int,
    noise: mx.array | None = None,
) -> Levels:
    """The W most probable continuations at every level.

    Args:
        context: (C,) of the last committed token.
        root: () int32.
        noise: (L-1, V) temperature times the target's Gumbel noise at the drafted positions, over the
            drafter's vocabulary; None when greedy.

    Raises:
        ValueError: more beams than the drafter has tokens.
    """
    vocab = drafter.config.draft_vocab
    if width > vocab:
        raise ValueError(f"beam width must be at most the drafter's vocabulary {vocab}, not {width}")
    target_ids = drafter.target_ids()
    tokens, slots, logprobs = [], [], []
    state = drafter.next_state(None, embed(root.reshape(1)))  # (1, H): only one beam grows at first
    total = mx.zeros((1, 1))
    prepared = drafter.prepare(context[None])
    for level in range(length - 1):
        rows = mx.broadcast_to(prepared, (state.shape[0], prepared.shape[1]))
        logits = drafter.head(drafter.features(rows, state)).astype(mx.float32)  # (1 or W, V)
        scores = total + _log_softmax(drafter, logits, level, noise)
        best, index = top_k(scores.reshape(-1), width)
        slot, token = index // vocab, index % vocab
        token = token if target_ids is None else target_ids[token]
        tokens.append(token)
        slots.append(slot)
        logprobs.append(best)
        if level < length - 2:
            state = drafter.next_state(state[slot], embed(token))
            total = best[:, None]
    return Levels(mx.stack(tokens), mx.stack(slots), mx.stack(logprobs))


def _log_softmax(drafter: RecurrentDrafter, logits: mx.array, level: int, noise: mx.array | None) -> mx.array:
    if level < len(drafter.config.calibration):
        logits = logits / drafter.config.calibration[level]
    if noise is not None:
        logits = (logits + noise[level]) / SAMPLING_TAU
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def beams_of(levels: Levels, root: int) -> tuple[mx.array, mx.array]:
    """The surviving beams (W, L), root in column 0, best first, and their log-probabilities (W,)."""
    slot = mx.arange(levels.width, dtype=mx.int32)
    columns = []
    for level in range(levels.length - 2, -1, -1):
        columns.append(levels.tokens[level][slot])
        slot = levels.slots[level][slot]
    columns.append(mx.full((levels.width,), root, dtype=mx.int32))
    return mx.stack(columns[::-1], axis=1), levels.logprobs[-1]
