"""Beam search over any drafter that guesses level by level, W tokens a level, without a wait for the device.

The target draws its token at position p as argmax(log p + gumbel(seed, p)). The drafter adds the same noise to its own
logits, so that it guesses what the target will draw and not what is likely on average:

    scores = log softmax((logits / c + T gumbel) / tau)

with c the calibration of the depth, tau = 1.15, and tau = 1 at T = 0 (docs/algorithm.md, "Sampling").

Letters: W beam width, L beam length counting the root, V the drafter's vocabulary, C context size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx

from redrafter_mlx.tree import NEVER, Beam, Candidates

from .interface import Seen, TextDrafter
from .top_k import top_k

LARGE = 64 << 20
"""A search that reads at least so many bytes per level uses all cores: it takes longer than the host's own work."""

SAMPLING_TAU = 1.15  # divides the noisy scores; where it comes from: docs/algorithm.md, "Sampling"

S = TypeVar("S")


class Recurrence(Protocol[S]):
    """A drafter that guesses level by level, as beam search calls it. `S` is its state, carried from level to level."""

    @property
    def vocab(self) -> int:
        """V, the number of tokens that it can guess."""

    @property
    def target_ids(self) -> mx.array | None:
        """(V,) int32, the target's id of each; None where they are the same."""

    @property
    def calibration(self) -> Sequence[float]:
        """Temperature of the logits at each depth, which makes its probabilities calibrated; 1 past the end."""

    def begin(self, context: mx.array, root: mx.array) -> S:
        """State after the root. context (C,), root () int32."""

    def logits(self, state: S, level: int) -> mx.array:
        """(1, V) at level 0, (W, V) below: logits for the token after each beam so far; float32. Below level 0 (1, V)
        too, where they are the same for all beams.
        """

    def advance(self, state: S, slots: mx.array, tokens: mx.array, level: int) -> S:
        """State after tokens (W,), target ids; token i extends the beam in slot slots[i] of the level before."""


@dataclass(frozen=True, slots=True)
class _Levels:
    """The result of a search: W tokens per level, and the slot of each one's parent."""

    tokens: mx.array
    """(L-1, W) int32, target ids, most probable first within a level"""
    slots: mx.array
    """(L-1, W) int32: slot of the parent in the level before; 0 in the first level (the root)"""
    logprobs: mx.array
    """(L-1, W) float32: log-probability of the path from the root"""


def search(recurrence: Recurrence[Any], seen: Seen, beam: Beam) -> Candidates:
    """The W most probable continuations at every level, P = W (L-1) candidates: level l, slot w at l W + w.

    Where `beam.nodes` is None, only those on a beam that survives to the last level are offered.

    Raises:
        ValueError: more beams than the drafter has tokens.
    """
    return _candidates(_search(recurrence, seen, beam.width, beam.length), beam)


def beams(
    recurrence: Recurrence[Any], context: mx.array, root: int, width: int, length: int
) -> tuple[mx.array, mx.array]:
    """The beams that survive, (W, L) int32 with the root in column 0, best first, and their log-probabilities (W,).

    Raises:
        ValueError: more beams than the drafter has tokens.
    """
    levels = _search(recurrence, Seen(context, mx.array(root, dtype=mx.int32), None), width, length)
    slot = mx.arange(width, dtype=mx.int32)
    columns = []
    for level in range(length - 2, -1, -1):
        columns.append(levels.tokens[level][slot])
        slot = levels.slots[level][slot]
    columns.append(mx.full((width,), root, dtype=mx.int32))
    return mx.stack(columns[::-1], axis=1), levels.logprobs[-1]


def _search(recurrence: Recurrence[Any], seen: Seen, width: int, length: int) -> _Levels:
    vocab, ids = recurrence.vocab, recurrence.target_ids
    if width > vocab:
        raise ValueError(f"beam width must be at most the drafter's vocabulary {vocab}, not {width}")
    noise = seen.noise
    if noise is not None and ids is not None:
        noise = mx.take(noise, ids, axis=1)
    tokens, slots, logprobs = [], [], []
    state, total = recurrence.begin(seen.context, seen.root), mx.zeros((1, 1))
    for level in range(length - 1):
        logits = recurrence.logits(state, level)
        scores = total + _logprobs(logits, recurrence.calibration, level, noise)
        best, index = top_k(scores.reshape(-1), width)
        slot, token = index // vocab, index % vocab
        token = token if ids is None else ids[token]
        tokens.append(token)
        slots.append(slot)
        logprobs.append(best)
        if level < length - 2:
            state = recurrence.advance(state, slot, token, level)
            total = best[:, None]
    return _Levels(mx.stack(tokens), mx.stack(slots), mx.stack(logprobs))


def _logprobs(logits: mx.array, calibration: Sequence[float], level: int, noise: mx.array | None) -> mx.array:
    if level < len(calibration):
        logits = logits / calibration[level]
    if noise is not None:
        logits = (logits + noise[level]) / SAMPLING_TAU
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _candidates(levels: _Levels, beam: Beam) -> Candidates:
    height, width = levels.tokens.shape
    if width == 1:
        parents = mx.arange(-1, height - 1, dtype=mx.int32)
        return Candidates(levels.tokens[:, 0], parents, levels.logprobs[:, 0], height, is_chain=True)
    first = (mx.arange(height, dtype=mx.int32) - 1)[:, None] * width  # index of the level above's first slot
    parents = mx.where(first < 0, -1, first + levels.slots)
    logprobs = levels.logprobs
    if beam.nodes is None:
        logprobs = mx.where(_survivors(levels.slots), logprobs, NEVER)
    return Candidates(levels.tokens.reshape(-1), parents.reshape(-1), logprobs.reshape(-1), height)


def _survivors(slots: mx.array) -> mx.array:
    """(L-1, W) bool: True where a candidate lies on a beam of the last level."""
    height, width = slots.shape
    order = mx.arange(width, dtype=mx.int32)
    alive = mx.ones((width,), dtype=mx.bool_)
    rows = [alive]
    for level in range(height - 1, 0, -1):  # which slots of level - 1 have a surviving child
        child_of = slots[level][:, None] == order
        alive = mx.any(child_of & alive[:, None], axis=0)
        rows.append(alive)
    return mx.stack(rows[::-1])


class BeamDrafter(Generic[S]):
    """A mixin that makes a drafter of a module with a `recurrence`, by beam search.

    It keeps nothing of a text: a draft is a function of the last context and the root. One that does overrides `start`.
    """

    source = "recurrent"
    needs_text = False
    needs_rows: bool = False
    max_length: int | None = None

    def recurrence(self) -> Recurrence[S]:
        """The recurrence that is searched, with the target's embedding."""
        raise NotImplementedError

    @property
    def max_width(self) -> int:
        return self.recurrence().vocab

    @property
    def nbytes(self) -> int:
        """Bytes that one level of a search reads."""
        raise NotImplementedError

    @property
    def num_cores(self) -> int | None:
        """Cores for a search on a CPU, None for all. A small drafter uses one, because the host needs another to build
        the next verification while the search runs.
        """
        return None if self.nbytes >= LARGE else 1

    def start(self, tokens: Sequence[int]) -> TextDrafter:
        return self

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        return search(self.recurrence(), seen, beam)

    def keep(self, tokens: Sequence[int]) -> None:
        pass
