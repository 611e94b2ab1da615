"""The shards as training batches: windows of consecutive positions in an order that depends on the seed alone.

Contexts stay on disk and are mapped into memory, so a corpus may be larger than the machine's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .data import contexts_path, list_shards
from .loss import Batch
from .prompts import is_held_out

HELD_OUT_EVERY = 20


@dataclass(frozen=True, slots=True)
class Shard:
    contexts: np.ndarray
    """(n, C) float16, mapped"""
    tokens: np.ndarray
    """(n,) int32"""
    left: np.ndarray
    """(n,) int32: tokens that follow in the same answer"""
    training: np.ndarray
    """positions of answers to train on"""
    held_out: np.ndarray
    """positions of the held-out greedy answers"""

    @classmethod
    def load(cls, path: Path) -> Shard:
        contexts = np.load(contexts_path(path), mmap_mode="r")
        with np.load(path) as data:
            tokens, starts, temperatures = data["tokens"], data["starts"], data["temperatures"]
            held = np.array([is_held_out(str(text), HELD_OUT_EVERY) for text in data["prompts"]])
        if len(contexts) != len(tokens):
            raise ValueError(
                f"{path} has {len(tokens)} tokens, but {len(contexts)} contexts; delete both files"
            )
        lengths = np.diff(starts)
        ends = np.repeat(starts[1:], lengths)
        positions = np.arange(len(tokens))
        left = (ends - positions - 1).astype(np.int32)
        training = positions[np.repeat(~held, lengths)]
        held_out = positions[np.repeat(held & (temperatures == 0), lengths)]
        return cls(contexts, tokens, left, training, held_out)


@dataclass(frozen=True, slots=True)
class WindowShape:
    """Shape of a batch."""

    windows: int
    """N"""
    size: int
    """P, positions in a window"""
    depths: int
    """K"""


class Corpus:
    """All shards of some folders.

    Args:
        folders: each filled by `redrafter_mlx.train.data`.
        limit: use about this many training positions only, the first ones of every shard.

    Raises:
        ValueError: no data, or shards whose contexts differ in size.
    """

    def __init__(self, folders: Sequence[Path], limit: int | None = None) -> None:
        self.shards = [Shard.load(path) for folder in folders for path in list_shards(folder)]
        if not self.shards:
            raise ValueError(f"no complete shard in {', '.join(map(str, folders))}")
        sizes = {shard.contexts.shape[1] for shard in self.shards}
        if len(sizes) > 1:
            raise ValueError(f"the shards' contexts must have one size, but have {sorted(sizes)}")
        self.context_size = sizes.pop()
        self.num_held_out = sum(len(s.held_out) for s in self.shards)
        self._training = [shard.training for shard in self.shards]
        total = sum(map(len, self._training))
        if limit is not None and limit < total:
            kept = [len(positions) * limit // total for positions in self._training]
            self._training = [p[:n] for p, n in zip(self._training, kept, strict=True)]
        self.num_positions = sum(map(len, self._training))
        if not self.num_positions:
            raise ValueError("the shards hold no position to train on; write more answers")

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the text trained on, (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for shard, positions in zip(self.shards, self._training, strict=True):
            counts += np.bincount(shard.tokens[positions], minlength=vocab_size)
        return counts

    def sample(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """About `count` training positions, evenly spread: contexts (m, C) float32 and tokens (m,)."""
        step = max(1, self.num_positions // count)
        pairs = [(s, p[::step]) for s, p in zip(self.shards, self._training, strict=True)]
        contexts = np.concatenate([shard.contexts[rows].astype(np.float32) for shard, rows in pairs])
        return contexts, np.concatenate([shard.tokens[rows] for shard, rows in pairs])

    def num_batches(self, shape: WindowShape) -> int:
        """Batches in an epoch, the same for all epochs."""
        windows = sum(max(0, len(p) - shape.size) // shape.size for p in self._training)
        return max(1, windows // shape.windows)

    def epoch(self, epoch: int, seed: int, shape: WindowShape, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch after the first `skip`. Every epoch has its own window offsets and order."""
        rng = np.random.default_rng([seed, epoch])
        offsets = rng.integers(shape.size, size=len(self._training))
        table = [
            (i, begin)
            for i, positions in enumerate(self._training)
            for begin in range(int(offsets[i]), len(positions) - 1, shape.size)
        ]
        order = rng.permutation(len(table))
        for batch in range(skip, self.num_batches(shape)):
            chosen = [table[k] for k in order[batch * shape.windows : (batch + 1) * shape.windows]]
            yield self._batch(chosen, self._training, shape)

    def held_out(self, shape: WindowShape, limit: int) -> Iterator[Batch]:
        """Batches over up to `limit` held-out positions, spread over the shards."""
        positions = [shard.held_out for shard in self.shards]
        table = [(i, b) for i, p in enumerate(positions) for b in range(0, len(p), shape.size)]
        table = table[:: max(1, len(table) * shape.size // max(1, limit))]
        for begin in range(0, len(table), shape.windows):
            yield self._batch(table[begin : begin + shape.windows], positions, shape)

    def held_out_answers(self, limit: int) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Held-out greedy answers of about `limit` tokens in all, spread over the shards: contexts (n, C), tokens."""
        spans = [
            (shard, span)
            for shard in self.shards
            for span in np.split(shard.held_out, np.flatnonzero(shard.left[shard.held_out] == 0) + 1)
            if len(span)
        ]
        total = sum(len(span) for _, span in spans)
        for shard, span in spans[:: max(1, total // max(1, limit))]:
            yield shard.contexts[span], shard.tokens[span].tolist()

    def _batch(
        self, chosen: Sequence[tuple[int, int]], positions: Sequence[np.ndarray], shape: WindowShape
    ) -> Batch:
        contexts, tokens, left = [], [], []
        size, depths = shape.size, shape.depths
        for index, begin in chosen:
            shard, allowed = self.shards[index], positions[index]
            offsets = begin + np.arange(size + depths)
            rows = allowed[np.minimum(offsets, len(allowed) - 1)]
            contexts.append(shard.contexts[rows])
            tokens.append(shard.tokens[rows])
            # a window past the end repeats the last position: depths that reach there must not count
            room = np.maximum(len(allowed) - 1 - offsets[:size], 0)
            left.append(np.minimum(shard.left[rows[:size]], room))
        return Batch(
            mx.array(np.stack(contexts).astype(np.float32)),
            mx.array(np.stack(tokens).astype(np.int32)),
            mx.array(np.stack(left).astype(np.int32)),
        )
