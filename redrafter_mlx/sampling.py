"""From logits to the target's own token: filters, penalties, and noise keyed by position.

choice = argmax(filter(logits) / T + gumbel(seed, position)) is a draw from softmax(filter(logits) / T). The
noise depends on nothing but the seed and the token's absolute position, so the text is a function of model,
prompt, settings and seed, whatever was drafted (docs/algorithm.md, "Sampling").

The filters are mlx-lm's, in its order, on the distribution before the temperature: top-p, min-p, top-k.
No filter sorts the vocabulary: a threshold is found by bisecting the bits of the float, 30 passes that any
device does fast.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .device import fused
from .tree import TokenTree, ancestor_mask

COLDEST = 1e-6
"""Below this temperature the most probable token is taken: dividing by less would overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target's token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.0
    """0 or more; below 1e-6 it counts as 0."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this mass, at least one; 1 keeps all."""
    top_k: int = 0
    """Keep this many; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most probable one's probability."""
    seed: int | None = None
    """0 to 2**64 - 1; None: a fresh one, which `stats.seed` reports."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens seen in prompt or text by this, multiply negative ones; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtract as many times as the token was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Add to the logits of these tokens. Keys may be numbers written as text, as JSON has them."""

    def __post_init__(self) -> None:
        def check(name: str, rule: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        def within(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return _is_number(value) and low <= value <= high

        check("temperature", "a number, 0 or more", within("temperature", 0, _HUGE))
        check("top_p", "between 0 and 1", within("top_p", 0, 1))
        check("top_k", "an integer, 0 or more", _is_integer(self.top_k) and self.top_k >= 0)
        check("min_p", "between 0 and 1", within("min_p", 0, 1))
        seed_ok = self.seed is None or (_is_integer(self.seed) and 0 <= self.seed < 2**64)
        check("seed", "an integer, 0 to 2**64 - 1", seed_ok)
        check("repetition_penalty", "a number above 0", within("repetition_penalty", 1e-30, _HUGE))
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, "a number", within(name, -_HUGE, _HUGE))
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the ids of `logit_bias` against the target's vocabulary.

        Raises:
            ValueError: a token that the target does not have.
        """
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias must name tokens in 0..{vocab_size - 1}, not {token}")

    def seeded(self) -> Sampling:
        """The same with a definite seed."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


_HUGE = 1e30  # larger values overflow float32 on the way
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= _HUGE  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, not {bias!r}")
    checked = {}
    for token, value in bias.items():
        number = int(token) if isinstance(token, str) and token.strip().isdecimal() else token
        if not _is_integer(number):
            raise ValueError(f"logit_bias must have token ids as keys, not {token!r}")
        if not _is_number(value) or abs(value) > _HUGE:
            raise ValueError(f"logit_bias of token {token} must be a number, not {value!r}")
        checked[int(number)] = float(value)
    return checked


def gumbel(seed: int, positions: mx.array, vocab_size: int) -> mx.array:
    """Standard Gumbel noise, a row per absolute position. positions (L,) int32 -> (L, V) float32.

    The key of a row is (seed, position) itself: Threefry is counter-based, so keys need no spreading. What a seed has
    beyond 32 bits goes, spread by Knuth's odd multiplier, to the word of the position.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) * 2654435761 & 0xFFFFFFFF
    words = positions.astype(mx.uint32) ^ mx.array(high, dtype=mx.uint32)
    keys = mx.stack([mx.full(positions.shape, low, dtype=mx.uint32), words], axis=1)
    return mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)


class PositionNoise:
    """Gumbel noise by absolute position, each row computed once though every draft looks ahead over several.

    Positions live on the device (the next draft is queued before the host knows where it stands); the host
    gives bounds. Rows are made in blocks and forgotten when the text has passed them.
    """

    BLOCK = 8

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed, self._vocab_size = seed, vocab_size
        self._first = 0
        self._rows: mx.array | None = None  # (n, V): positions first ... first + n - 1

    def at(self, positions: mx.array, low: int, high: int) -> mx.array:
        """Noise of positions (L,) int32, which lie in low ... high - 1; `low` never falls. -> (L, V)"""
        if self._rows is None:
            self._first, self._rows = low, self._make(low, high)
        end = self._first + self._rows.shape[0]
        if high > end:
            kept = self._rows[low - self._first :]
            self._first, self._rows = low, mx.concatenate([kept, self._make(max(end, low), high)])
        return self._rows[positions - self._first]

    def _make(self, begin: int, end: int) -> mx.array:
        count = -(-(end - begin) // self.BLOCK) * self.BLOCK
        return gumbel(self._seed, mx.arange(begin, begin + count, dtype=mx.int32), self._vocab_size)


def choose(logits: mx.array, sampling: Sampling, noise: mx.array | None) -> mx.array:
    """The target's own token for every row.

    Args:
        logits: (N, V), penalties already applied.
        noise: (N, V) Gumbel noise of the position each row's token will take; None when greedy.

    Returns:
        (N,) int32.
    """
    if sampling.is_greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    assert noise is not None
    logits = filtered(logits.astype(mx.float32), sampling)
    return mx.argmax(logits / sampling.temperature + noise, axis=-1).astype(mx.int32)


def filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """(N, V) float32 with -inf where a filter drops the token."""
    if sampling.top_p < 1:
        mass = max(sampling.top_p, 1e-9)  # some mass, so that 0 keeps the most probable token
        logits = mx.where(_top_p(mx.softmax(logits, axis=-1), mass), logits, -mx.inf)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = mx.where(logits >= floor, logits, -mx.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = mx.where(_top_k(logits, sampling.top_k), logits, -mx.inf)
    return logits


@fused
def _top_p(probs: mx.array, top_p: float) -> mx.array:
    """Tokens in falling order until their mass reaches top_p; of equals, all."""

    def enough(threshold: mx.array) -> mx.array:
        return mx.where(probs >= threshold, probs, 0).sum(axis=-1, keepdims=True) >= top_p

    return probs >= _bisect(enough, probs.shape[0])


@fused
def _top_k(logits: mx.array, k: int) -> mx.array:
    """The k largest; of equals at the border, all."""
    # exp(x - max) is positive, so its bits order as its value does; what underflows to 0 ties with -inf.
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))

    def enough(threshold: mx.array) -> mx.array:
        return (weights >= threshold).sum(axis=-1, keepdims=True) >= k

    return weights >= _bisect(enough, logits.shape[0])


def _bisect(enough, num_rows: int) -> mx.array:  # type: ignore[no-untyped-def]
    """(N, 1): per row the largest float in [0, 2) for which `enough` holds; it must hold at 0.

    Positive floats order as their bit patterns, so 30 bits are decided one by one from the top.
    """
    bits = mx.zeros((num_rows, 1), dtype=mx.uint32)
    for bit in range(29, -1, -1):
        candidate = bits | mx.array(1 << bit, dtype=mx.uint32)
        bits = mx.where(enough(candidate.view(mx.float32)), candidate, bits)
    return bits.view(mx.float32)


def penalized(  # noqa: PLR0913  (arrays of one node each)
    logits: mx.array,
    sampling: Sampling,
    prompt: mx.array,
    generated: mx.array,
    tree: TokenTree | None,
    bias: mx.array | None = None,
) -> mx.array:
    """Apply penalties and bias, each node with its own history.

    Args:
        logits: (N, V).
        prompt: (V,) float32, how often every token stands in the prompt.
        generated: (V,) float32, and in the text generated before the root.
        tree: N nodes of generated text, the root included; None where nothing is generated yet.
        bias: (V,) float32.
    """
    logits = logits.astype(mx.float32)
    if bias is not None:
        logits = logits + bias
    generated = generated[None]
    if tree is not None:
        mask = ancestor_mask(tree.parents, tree.height) if tree.mask is None else tree.mask
        rows = mx.broadcast_to(mx.arange(tree.num_nodes)[:, None], mask.shape)
        columns = mx.broadcast_to(tree.tokens[None], mask.shape)
        own = mx.zeros(logits.shape).at[rows, columns].add(mask.astype(mx.float32))  # (N, V)
        generated = generated + own
    seen = (generated + prompt[None]) > 0
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - sampling.frequency_penalty * generated
    return logits - sampling.presence_penalty * (generated > 0)


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

    def first(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """The first token of the text, (1,) int32, from the logits (1, V) after the prompt."""
        if self._counts is not None:
            logits = penalized(logits, self.sampling, *self._counts, None, self._bias)
        return choose(logits, self.sampling, noise)

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
