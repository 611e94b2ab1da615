"""The shards as training batches: windows of consecutive positions in an order that depends on the seed alone.

Contexts stay on disk and are mapped into memory, so a corpus may be larger than the machine's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .loss import Batch
from .prompts import is_held_out
from .shards import list_shards, read_shard

HELD_OUT_EVERY = 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard, ready to train on."""

    path: Path
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
        """Read a shard.

        Raises:
            ValueError: it is damaged.
        """
        text, contexts = read_shard(path)
        tokens, starts = text.tokens, text.starts
        held = np.array([is_held_out(prompt, HELD_OUT_EVERY) for prompt in text.prompts])
        lengths = np.diff(starts)
        ends = np.repeat(starts[1:], lengths)
        positions = np.arange(len(tokens))
        left = (ends - positions - 1).astype(np.int32)
        training = positions[np.repeat(~held, lengths)]
        held_out = positions[np.repeat(held & (text.temperatures == 0), lengths)]
        return cls(path, contexts, tokens, left, training, held_out)


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
    """Some shards.

    Args:
        sources: shards, or folders of them, as `redrafter_mlx.train.data` fills them.
        limit: use about this many training positions only, the first ones of every shard.

    Raises:
        ValueError: no data, a damaged shard, or shards whose contexts differ in size.
    """

    def __init__(self, sources: Sequence[Path], limit: int | None = None) -> None:
        paths = [
            path for source in sources for path in (list_shards(source) if source.is_dir() else [source])
        ]
        if not paths:
            raise ValueError(f"no complete shard in {', '.join(map(str, sources)) or 'the data'}")
        self.shards = [Shard.load(path) for path in paths]
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
        return self._num_windows(shape) // shape.windows

    def _num_windows(self, shape: WindowShape) -> int:
        """Windows that every epoch has, wherever the first one begins."""
        return sum(max(0, len(p) - shape.size) // shape.size for p in self._training)

    def check_enough(self, shape: WindowShape) -> None:
        """Check that the text fills a batch.

        Raises:
            ValueError: it does not; how much there is, and how much is needed.
        """
        needed = shape.windows * shape.size
        if self._num_windows(shape) < shape.windows:
            held = sum(len(s.tokens) for s in self.shards) - sum(len(s.training) for s in self.shards)
            raise ValueError(
                f"there is too little text to train on: {self.num_positions} tokens in {len(self.shards)} shards "
                f"(and {held} held out), and one batch takes {needed} in windows of {shape.size} (--batch). Ask for "
                f"more or longer answers: at least {needed + 2 * shape.size * len(self.shards)} tokens, and "
                "100,000 for a drafter that helps"
            )

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
