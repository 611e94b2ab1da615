"""The target's own choice of a token: filters, penalties and noise, brought together for one text.

Letters: L beam length counting the root, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from redrafter_mlx.tree import TokenTree

from .filters import filtered
from .noise import PositionNoise
from .penalties import penalized
from .settings import Sampling


def scores(logits: mx.array, sampling: Sampling, noise: mx.array | None) -> mx.array:
    """What the target's token is the largest of: the logits when greedy, else filtered logits / T + noise.

    Args:
        logits: (N, V), penalties already applied.
        noise: (N, V) Gumbel noise of the position each row's token will take; None when greedy.

    Returns:
        (N, V), float32 unless greedy.
    """
    if sampling.is_greedy:
        return logits
    assert noise is not None
    return filtered(logits.astype(mx.float32), sampling) / sampling.temperature + noise


def choose(logits: mx.array, sampling: Sampling, noise: mx.array | None) -> mx.array:
    """The target's own token for every row, (N,) int32; arguments as for `scores`."""
    return mx.argmax(scores(logits, sampling, noise), axis=-1).astype(mx.int32)


class Sampler:
    """The target's own choice of tokens in one text: filters, penalties and position-keyed noise.

    Args:
        history: tokens before the first one that is chosen: the prompt.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, history: Sequence[int]) -> None:
        sampling.check_vocabulary(vocab_size)
        self.sampling = sampling.seeded()
        assert self.sampling.seed is not None
        self._noise = None if sampling.is_greedy else PositionNoise(self.sampling.seed, vocab_size)
        self._counts: tuple[mx.array, mx.array] | None = None  # of the prompt; of the generated text
        self._bias: mx.array | None = None
        if sampling.has_penalties:
            zeros = mx.zeros((vocab_size,))
            self._counts = zeros.at[mx.array(list(history))].add(1.0), zeros
        if sampling.logit_bias:
            tokens = mx.array(list(sampling.logit_bias))
            self._bias = mx.zeros((vocab_size,)).at[tokens].add(mx.array(list(sampling.logit_bias.values())))

    def noise(self, positions: mx.array, low: int, count: int) -> mx.array | None:
        """(L, V) noise of positions (L,), which lie in low ... low + count - 1; None when greedy."""
        return None if self._noise is None else self._noise.at(positions, low, low + count)

    def scores(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """Scores (1, V) of the token after all that is committed, from its logits (1, V) and noise (1, V)."""
        if self._counts is not None:
            logits = penalized(logits, self.sampling, *self._counts, None, self._bias)
        return scores(logits, self.sampling, noise)

    def first(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """The first token of the text, (1,) int32, from the logits (1, V) after the prompt."""
        return mx.argmax(self.scores(logits, noise), axis=-1).astype(mx.int32)

    def choose(self, logits: mx.array, tree: TokenTree, noise: mx.array | None) -> mx.array:
        """The target's token after every node, (N,) int32. noise (L, V): row d is for nodes of depth d."""
        if self._counts is not None:
            logits = penalized(logits, self.sampling, *self._counts, tree, self._bias)
        return choose(logits, self.sampling, None if noise is None else noise[tree.depth])

    def commit(self, tokens: mx.array, path: Sequence[int] | None = None) -> None:
        """Count tokens (n,) int32 as generated: those at the indices of `path`, or all."""
        if self._counts is not None:
            prompt, generated = self._counts
            kept = tokens if path is None else tokens[mx.array(list(path))]
            self._counts = prompt, generated.at[kept].add(1.0)
