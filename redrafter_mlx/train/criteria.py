"""What a guess is worth against the target's distribution: four losses of a row, with gradients by hand.

p is the target's distribution over the drafter's vocabulary (it sums to less than 1 where the teacher is a token that
the vocabulary lacks), q the drafter's, a the token of the text.

- `kl`: the cross-entropy of p and q, which is KL(p || q) up to a constant.
- `tv`: 0.1 x cross-entropy of a + 0.9 x (1 - A), A = sum_i min(p_i, q_i) being the acceptance of speculative sampling
  and 1 - A the total variation (of whole distributions). Source: DSpark, deepseek-ai/DeepSpec, 2026.
- `lk`: w x kl + (1 - w) x (1 - A) with w = exp(-3 A), a constant for the gradient: likelihood while the guess is bad,
  acceptance once it is good. Source: Samarin et al., arXiv 2602.23881, the hybrid of their LK losses.
- `gumbel`: -log of the probability that target and drafter, who share their Gumbel noise here, choose the same token at
  temperature 1: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i). With standard exponentials E, token i is both choices just
  if E_j >= E_i max(p_j / p_i, q_j / q_i) for every other j; integrating over E_i gives the term.

Gradients are by the drafter's logits and are computed with the loss, one block of rows after another, because logits of
all rows would fill the memory. Weights are applied afterwards, to whole rows.

Letters: M rows, m rows of a block, V the drafter's vocabulary, X width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, cast

import mlx.core as mx

from redrafter_mlx.kernels import exponential

Loss = Literal["kl", "tv", "lk", "gumbel"]
LOSSES: tuple[Loss, ...] = ("kl", "tv", "lk", "gumbel")

LOGIT_BYTES = 64 << 20
"""Upper bound on a block of logits, in bytes."""
TV_SHARE = 0.9
"""Of the total variation in `tv`; the rest is the cross-entropy of the token."""
LK_RATE = 3.0
KEPT = 512
"""Tokens that `gumbel` compares one by one: sorting thousands takes longer than all the rest of a training step."""
_TINY = 1e-30

Criterion = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(guess q (m, V), log q (m, V), p (m, V), tokens (m, 1), -1 outside the vocabulary) -> losses (m, 1), gradients by the
logits (m, V)."""


def softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(m, V) -> probabilities (m, V) and log of the normalizer (m, 1)."""
    top = logits.max(axis=-1, keepdims=True)
    powers = exponential(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / total, top + mx.log(total)


def _kl(guess: mx.array, log_guess: mx.array, probs: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    mass = probs.sum(axis=-1, keepdims=True)
    return -(probs * log_guess).sum(axis=-1, keepdims=True), mass * guess - probs


def _tv(guess: mx.array, log_guess: mx.array, probs: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    known = tokens >= 0
    own = mx.take_along_axis(log_guess, mx.maximum(tokens, 0), axis=-1)
    entropy = mx.where(known, -own, 0.0)
    is_token = tokens == mx.arange(guess.shape[-1])
    accepted, by_logits = _overlap(guess, probs)
    losses = (1 - TV_SHARE) * entropy + TV_SHARE * (1 - accepted)
    return losses, (1 - TV_SHARE) * mx.where(known, guess - is_token, 0.0) - TV_SHARE * by_logits


def _lk(guess: mx.array, log_guess: mx.array, probs: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    accepted, by_logits = _overlap(guess, probs)
    entropy, error = _kl(guess, log_guess, probs, tokens)
    share = mx.exp(-LK_RATE * accepted)
    return share * entropy + (1 - share) * (1 - accepted), share * error - (1 - share) * by_logits


def _gumbel(guess: mx.array, _: mx.array, probs: mx.array, __: mx.array) -> tuple[mx.array, mx.array]:
    accepted, by_guess = shared_noise_acceptance(guess, probs)
    inner = (guess * by_guess).sum(axis=-1, keepdims=True)
    accepted = mx.maximum(accepted, _TINY)
    return -mx.log(accepted), -guess * (by_guess - inner) / accepted


CRITERIA: dict[Loss, Criterion] = {"kl": _kl, "tv": _tv, "lk": _lk, "gumbel": _gumbel}


def _overlap(guess: mx.array, probs: mx.array) -> tuple[mx.array, mx.array]:
    """sum_i min(p_i, q_i), (m, 1), and its gradient by the logits of q, (m, V)."""
    below = mx.where(guess < probs, guess, 0.0)  # where more of q would be accepted
    return mx.minimum(guess, probs).sum(axis=-1, keepdims=True), below - guess * below.sum(
        axis=-1, keepdims=True
    )


def shared_noise_acceptance(guess: mx.array, probs: mx.array, kept: int = KEPT) -> tuple[mx.array, mx.array]:
    """The probability that argmax(log q + noise) = argmax(log p + noise) for one standard Gumbel noise.

    With the tokens sorted by falling p / q, the sum over j of max(p_j / p_i, q_j / q_i) is P_i / p_i + Q_i / q_i, P_i
    being the sum of p up to i and Q_i that of q behind it. So a term is p_i q_i / (P_i q_i + Q_i p_i), and sorting
    makes O(V log V) of O(V^2).

    The rest, what p lacks and all tokens but the `kept` likeliest ones, stands in the sums as if it were one token that
    is never accepted. Exact for V <= `kept`; else off by at most the rest's share of p and q.

    Args:
        guess, probs: q and p, (m, V); a row of p sums to at most 1.

    Returns:
        (m, 1), and its gradient by q taken as V free numbers, (m, V).
    """
    chosen = mx.broadcast_to(mx.arange(guess.shape[-1])[None], guess.shape)
    if guess.shape[-1] > kept:
        chosen = mx.argpartition(-(guess + probs), kept, axis=-1)[:, :kept]
    p, q = mx.take_along_axis(probs, chosen, axis=-1), mx.take_along_axis(guess, chosen, axis=-1)
    order = mx.argsort(q / mx.maximum(p, _TINY), axis=-1)
    chosen, p, q = (mx.take_along_axis(each, order, axis=-1) for each in (chosen, p, q))
    rest_p, rest_q = (mx.maximum(1 - each.sum(axis=-1, keepdims=True), 0.0) for each in (p, q))
    if guess.shape[-1] <= kept:
        rest_q = mx.zeros_like(rest_q)  # but for rounding
    is_before = rest_p * q >= rest_q * p
    before = p.cumsum(axis=-1) + mx.where(is_before, rest_p, 0.0)
    behind = q.cumsum(axis=-1, reverse=True) - q + mx.where(is_before, 0.0, rest_q)
    share = p / mx.maximum(before * q + behind * p, _TINY)  # the term by q_i
    squares = share * share
    spent = q * squares  # by the q of every token behind
    gradient = squares * behind - (spent.cumsum(axis=-1) - spent)
    of_rest = -mx.where(is_before, 0.0, spent).sum(axis=-1, keepdims=True)
    everywhere = mx.broadcast_to(of_rest, guess.shape)
    accepted = (q * share).sum(axis=-1, keepdims=True)
    return accepted, mx.put_along_axis(everywhere, chosen, gradient, axis=-1)


def row_blocks(features: mx.array, matrix: mx.array) -> Iterator[tuple[slice, mx.array]]:
    """Logits (m, V) = features @ matrix.T, one block of rows after another."""
    block = max(1, LOGIT_BYTES // (4 * matrix.shape[0]))
    for begin in range(0, features.shape[0], block):
        part = slice(begin, begin + block)
        yield part, features[part] @ matrix.T


def _frozen_head_kl(
    features: mx.array, matrix: mx.array, expected: mx.array, mass: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`kl` of every row against a `matrix` that is not trained.

    The teacher p enters through its mean row alone: the cross-entropy is sum(p) log Z - features @ (p @ matrix),
    and its gradient by the features is sum(p) softmax @ matrix - p @ matrix. So no array as wide as the
    vocabulary is needed for the teacher, which is the same at all depths.

    Args:
        features: (M, H).
        matrix: (V, H), so that features @ matrix.T are the logits.
        expected: (M, H), p @ matrix.
        mass: (M, 1), sum of p: 1, or less where the token is not in the vocabulary.

    Returns:
        the losses (M, 1); their gradients by `features` (M, H), computed here because the probabilities are at hand;
        and the logs of the normalizers (M, 1), without a gradient.
    """
    losses, gradients, normalizers = [], [], []
    ones = mx.ones((matrix.shape[0], 1))
    for part, logits in row_blocks(features, matrix):
        top = logits.max(axis=-1, keepdims=True)
        powers = exponential(logits - top)
        total = powers @ ones  # a matrix product sums faster on the CPU
        normalizer = top + mx.log(total)
        agreement = (features[part] * expected[part]).sum(axis=-1, keepdims=True)
        losses.append(mass[part] * normalizer - agreement)
        gradients.append(mass[part] * (powers @ matrix) / total - expected[part])
        normalizers.append(normalizer)
    return mx.concatenate(losses), mx.concatenate(gradients), mx.concatenate(normalizers)


HeadLoss = Callable[..., tuple[mx.array, ...]]


def _frozen_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return (cotangents[0] * outputs[1], *(mx.zeros_like(primal) for primal in primals[1:]))


def _with_vjp(function: HeadLoss, vjp: Callable[..., tuple[mx.array, ...]]) -> HeadLoss:
    custom = mx.custom_function(function)
    custom.vjp(vjp)
    return cast(HeadLoss, custom)


def head_loss(loss: Loss, is_frozen: bool) -> HeadLoss:
    """The loss of every row as a function of features (M, X), matrix (V, X), p (M, V) and tokens (M, 1).

    It returns the losses (M, 1), their gradients by the features (M, X) and the logs of the normalizers (M, 1); only
    the first have a gradient, by the features and, unless `is_frozen`, by the matrix.
    """
    criterion = CRITERIA[loss]

    def forward(
        features: mx.array, matrix: mx.array, probs: mx.array, tokens: mx.array
    ) -> tuple[mx.array, ...]:
        losses, gradients, normalizers = [], [], []
        for part, logits in row_blocks(features, matrix):
            guess, normalizer = softmax(logits)
            own, error = criterion(guess, logits - normalizer, probs[part], tokens[part])
            losses.append(own)
            gradients.append(error @ matrix)
            normalizers.append(normalizer)
        return mx.concatenate(losses), mx.concatenate(gradients), mx.concatenate(normalizers)

    def trained_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        features, matrix, probs, tokens = primals
        by_matrix = mx.zeros_like(matrix)
        for part, logits in row_blocks(features, matrix):
            guess, normalizer = softmax(logits)
            _, error = criterion(guess, logits - normalizer, probs[part], tokens[part])
            by_matrix = by_matrix + (cotangents[0][part] * error).T @ features[part]
        return cotangents[0] * outputs[1], by_matrix, mx.zeros_like(probs), mx.zeros_like(tokens)

    return _with_vjp(forward, _frozen_vjp if is_frozen else trained_vjp)


frozen_head_kl = _with_vjp(_frozen_head_kl, _frozen_vjp)
