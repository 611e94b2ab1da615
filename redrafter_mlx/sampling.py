"""From logits to the target's own token: filters, penalties, and noise keyed by position.

choice = argmax(filter(logits) / T + gumbel(seed, position)) is a draw from softmax(filter(logits) / T). The
noise depends on nothing but the seed and the token's absolute position, so the text is a function of model,
prompt, settings and seed, whatever was drafted (docs/algorithm.md, "Sampling").

The filters are mlx-lm's, in its order, on the distribution before the temperature: top-p, min-p, top-k.
None sorts the vocabulary: a threshold is found by bisecting the bits of the float, 31 passes that any
device does fast.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .device import fused


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target's token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.0
    """0 or more."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this mass; 1 (or 0, as mlx-lm has it) keeps all."""
    top_k: int = 0
    """Keep this many; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most probable one's probability."""
    seed: int | None = None
    """None: a fresh one, which `stats.seed` reports."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens seen in prompt or text by this, multiply negative ones; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtract as many times as the token was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Add to the logits of these tokens."""

    def __post_init__(self) -> None:
        def check(name: str, rule: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        finite = {name: math.isfinite(getattr(self, name)) for name in ("temperature", "top_p", "min_p")}
        check("temperature", "0 or more", finite["temperature"] and self.temperature >= 0)
        check("top_p", "between 0 and 1", finite["top_p"] and 0 <= self.top_p <= 1)
        check("top_k", "an integer, 0 or more", isinstance(self.top_k, int) and self.top_k >= 0)
        check("min_p", "between 0 and 1", finite["min_p"] and 0 <= self.min_p <= 1)
        check("seed", "0 to 2**64 - 1", self.seed is None or 0 <= self.seed < 2**64)
        check("repetition_penalty", "above 0", self.repetition_penalty > 0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    def seeded(self) -> Sampling:
        """The same with a definite seed."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


def gumbel(seed: int, positions: mx.array, vocab_size: int) -> mx.array:
    """Standard Gumbel noise, a row per absolute position. positions (L,) int32 -> (L, V) float32.

    The key of a row is (seed, position) itself: Threefry is counter-based, so keys need no spreading.
    """
    mixed = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    keys = mx.stack([mx.full(positions.shape, mixed, dtype=mx.uint32), positions.astype(mx.uint32)], axis=1)
    return mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)


class PositionNoise:
    """Gumbel noise by absolute position, each row computed once though every draft looks ahead over
    several.

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
    keep = None
    if 0 < sampling.top_p < 1:
        logits = mx.where(_top_p(mx.softmax(logits, axis=-1), sampling.top_p), logits, -mx.inf)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        keep = logits >= floor
        logits = mx.where(keep, logits, -mx.inf)
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

    Positive floats order as their bit patterns, so 30 bits are settled one by one from the top.
    """
    bits = mx.zeros((num_rows, 1), dtype=mx.uint32)
    for bit in range(29, -1, -1):
        candidate = bits | mx.array(1 << bit, dtype=mx.uint32)
        bits = mx.where(enough(candidate.view(mx.float32)), candidate, bits)
    return bits.view(mx.float32)


@dataclass(slots=True)
class TokenCounts:
    """How often every token stands in the prompt and in the generated text, for the penalties."""

    prompt: mx.array
    """(V,) float32"""
    generated: mx.array
    """(V,) float32"""

    @classmethod
    def of(cls, prompt: list[int], vocab_size: int) -> TokenCounts:
        zeros = mx.zeros((vocab_size,))
        return cls(zeros.at[mx.array(prompt)].add(1.0) if prompt else zeros, zeros)

    def add(self, tokens: mx.array) -> None:
        """Count tokens (n,) int32 as generated."""
        self.generated = self.generated.at[tokens].add(1.0)


def penalised(
    logits: mx.array, sampling: Sampling, counts: TokenCounts, tokens: mx.array, mask: mx.array
) -> mx.array:
    """Apply penalties and bias, each node with its own history.

    Args:
        logits: (N, V).
        counts: of everything committed before the root.
        tokens: (N,) int32 the tree's tokens (generated text, the root included).
        mask: (N, N) bool, a node's ancestors and itself.
    """
    logits = logits.astype(mx.float32)
    for token, bias in sampling.logit_bias.items():
        logits[:, token] = logits[:, token] + bias
    rows = mx.broadcast_to(mx.arange(tokens.shape[0])[:, None], mask.shape)
    columns = mx.broadcast_to(tokens[None], mask.shape)
    own = mx.zeros(logits.shape).at[rows, columns].add(mask.astype(mx.float32))  # (N, V)
    generated = counts.generated[None] + own
    seen = (generated + counts.prompt[None]) > 0
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - sampling.frequency_penalty * generated
    return logits - sampling.presence_penalty * (generated > 0)
