"""The training objective: to guess, several tokens ahead, what the target would say.

At a position j of a text the target has just chosen token a[j] (the root) from context c[j]. Depth i of the drafter is
fed a[j] .. a[j+i] and guesses a[j+1+i]. Its teacher there is the target's own distribution, softmax(rows c[j+1+i]) over
the drafter's vocabulary (soft targets), or the token itself (hard targets). All depths and positions are computed at
once, teacher forced; logits exist for one block of rows at a time.

Source: ReDrafter paper (arXiv 2403.09919) section 3.3, "local distillation"; the soft form is Hinton et al.,
1503.02531.

Letters: N windows, P positions in a window, K depths, T = P + K, C context size, H hidden size, V the drafter's
vocabulary, M rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from redrafter_mlx.drafters.interface import Embed
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.kernels import exponential, silu

LOGIT_BYTES = 64 << 20
"""Upper bound on a block of logits, in bytes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of consecutive positions, with the K positions after them as teachers."""

    contexts: mx.array
    """(N, T, C)"""
    tokens: mx.array
    """(N, T) int32, target ids; tokens[n, t] was chosen in contexts[n, t]"""
    left: mx.array
    """(N, P) int32: how many tokens the text has after this one; deeper guesses do not count"""
    weight_sum: mx.array | None = None
    """scalar that the weights of all guesses are divided by; None: their sum"""


@dataclass(frozen=True, slots=True)
class Objective:
    """How the guesses of all depths make one loss."""

    depths: int = 4
    """K = L - 1: tokens guessed at every position"""
    soft: float = 1.0
    """Weight of the target's distribution; the rest is on the token itself."""
    decay: float = 0.8
    """Weight of a depth relative to the one before: a later guess counts only if the earlier ones were accepted."""
    reach: float = 0.0
    """A depth also weighs p^reach, p being the probability that the drafter itself gave to the tokens before it:
    1 trains each depth where the drafter's own guesses would get there, 0 everywhere alike."""

    def __post_init__(self) -> None:
        if self.depths < 1:
            raise ValueError(f"depths must be at least 1, not {self.depths}")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft must be between 0 and 1, not {self.soft}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {self.decay}")
        if not 0 <= self.reach <= 1:
            raise ValueError(f"reach must be between 0 and 1, not {self.reach}")

    def weights(self, batch: Batch) -> mx.array:
        """(K, N, P): weight of every guess; they sum to 1, or to 0 if none counts."""
        weights = self._raw_weights(batch)
        total = weights.sum() if batch.weight_sum is None else batch.weight_sum
        return weights / mx.maximum(total, 1e-6)

    def share(self, batch: Batch, rank: int, size: int) -> Batch:
        """The windows of one of `size` processes; the mean of the processes' losses is the loss of the batch."""
        own = slice(rank, None, size)
        total = self._raw_weights(batch).sum() / size
        return Batch(batch.contexts[own], batch.tokens[own], batch.left[own], total)

    def _raw_weights(self, batch: Batch) -> mx.array:
        depth = mx.arange(self.depths)[:, None, None]
        return mx.where(batch.left[None] > depth, self.decay ** depth.astype(mx.float32), 0.0)


def depth_features(drafter: RecurrentDrafter, batch: Batch, embed: Embed, depths: int) -> list[mx.array]:
    """The drafter's features at every position and depth, teacher forced: K arrays (N, P, X or H).

    Equal to `drafter.features(...)` of `drafter.states(...)`, but what depends only on the context or on one token is
    computed once and not at every depth.
    """
    size, config = batch.left.shape[1], drafter.config
    embeddings = embed(batch.tokens[:, : size + depths - 1])
    inputs = drafter.rnn_w(embeddings) if config.rnn else embeddings
    prepared = drafter.prepare(batch.contexts[:, :size])
    state, out = None, []
    for depth in range(depths):
        x = inputs[:, depth : depth + size]
        if not config.rnn:
            state = x if state is None else x + state
        elif config.activation == "linear":
            state = x if state is None else x + drafter.rnn_u(state)
        else:
            state = silu(x + (drafter.rnn_u.bias if state is None else drafter.rnn_u(state)))
        out.append(drafter.features(prepared, state))
    return out


def _softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(M, V) -> probabilities (M, V) and log of the normalizer (M, 1)."""
    top = logits.max(axis=-1, keepdims=True)
    powers = exponential(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / total, top + mx.log(total)


def teacher_probs(contexts: mx.array, rows: mx.array) -> mx.array:
    """The target's distribution over the drafter's vocabulary: (..., C or H) and rows (V, H) -> (..., V)."""
    return _softmax(contexts[..., : rows.shape[1]] @ rows.T)[0]


def _row_blocks(features: mx.array, matrix: mx.array) -> Iterator[tuple[slice, mx.array]]:
    """Logits (m, V) = features @ matrix.T, one block of rows after another."""
    block = max(1, LOGIT_BYTES // (4 * matrix.shape[0]))
    for begin in range(0, features.shape[0], block):
        part = slice(begin, begin + block)
        yield part, features[part] @ matrix.T


def _frozen_head(
    features: mx.array, matrix: mx.array, expected: mx.array, mass: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Sum of weighted cross-entropies against a `matrix` that is not trained.

    The teacher p enters through its mean row alone: the cross-entropy is sum(p) log Z - features @ (p @ matrix),
    and its gradient by the features is sum(p) softmax @ matrix - p @ matrix. So no array as wide as the
    vocabulary is needed for the teacher, which is the same at all depths.

    Args:
        features: (M, H).
        matrix: (V, H), so that features @ matrix.T are the logits.
        expected: (M, H), p @ matrix.
        mass: (M, 1), sum of p: 1, or less where the token is not in the vocabulary.
        weights: (M, 1).

    Returns:
        the loss; its gradient by `features`, computed here because the probabilities are at hand; and the logs of the
        normalizers (M, 1), without a gradient.
    """
    losses, gradients, normalizers = [], [], []
    ones = mx.ones((matrix.shape[0], 1))
    for part, logits in _row_blocks(features, matrix):
        top = logits.max(axis=-1, keepdims=True)
        powers = exponential(logits - top)
        total = powers @ ones  # a matrix product sums faster on the CPU
        normalizer = top + mx.log(total)
        agreement = (features[part] * expected[part]).sum(axis=-1, keepdims=True)
        losses.append((weights[part] * (mass[part] * normalizer - agreement)).sum())
        gradients.append(weights[part] * (mass[part] * (powers @ matrix) / total - expected[part]))
        normalizers.append(normalizer)
    return mx.stack(losses).sum(), mx.concatenate(gradients), mx.concatenate(normalizers)


def _frozen_head_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return (cotangents[0] * outputs[1], *(mx.zeros_like(primal) for primal in primals[1:]))


def _trained_head(
    features: mx.array, matrix: mx.array, probs: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """As `_frozen_head`, for a `matrix` (V, X) that is trained too and a teacher `probs` (M, V). The third value is the
    gradient by the matrix.
    """
    losses, gradients, normalizers, by_matrix = [], [], [], mx.zeros_like(matrix)
    for part, logits in _row_blocks(features, matrix):
        guess, normalizer = _softmax(logits)
        mass = probs[part].sum(axis=-1, keepdims=True)
        entropies = mass * normalizer - (probs[part] * logits).sum(axis=-1, keepdims=True)
        losses.append((weights[part] * entropies).sum())
        error = weights[part] * (guess * mass - probs[part])
        gradients.append(error @ matrix)
        by_matrix = by_matrix + error.T @ features[part]
        normalizers.append(normalizer)
    return mx.stack(losses).sum(), mx.concatenate(gradients), by_matrix, mx.concatenate(normalizers)


def _trained_head_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    scale = cotangents[0]
    return (scale * outputs[1], scale * outputs[2], *(mx.zeros_like(p) for p in primals[2:]))


HeadLoss = Callable[..., tuple[mx.array, ...]]


def _with_vjp(function: HeadLoss, vjp: Callable[..., tuple[mx.array, ...]]) -> HeadLoss:
    custom = mx.custom_function(function)
    custom.vjp(vjp)
    return cast(HeadLoss, custom)


cross_entropy = _with_vjp(_frozen_head, _frozen_head_vjp)
cross_entropy_of_head = _with_vjp(_trained_head, _trained_head_vjp)


class Teacher:
    """What the guesses of a batch are compared with, at its positions 1 .. T - 1.

    A mixture of the target's distribution, with weight `soft`, and the token of the text. A token outside the drafter's
    vocabulary has no row, so such a position counts for less.
    """

    def __init__(self, drafter: RecurrentDrafter, batch: Batch, rows: mx.array, soft: float) -> None:
        self.contexts, self.rows, self.soft = batch.contexts[:, 1:], rows, soft
        self.draft_tokens = drafter.draft_ids()[batch.tokens[:, 1:]]
        """(N, T - 1): the drafter's id of the token of the text, -1 outside its vocabulary"""

    def probs(self) -> mx.array:
        """(N, T - 1, V)"""
        probs = mx.array(0.0)
        if self.soft > 0:
            probs = self.soft * teacher_probs(self.contexts, self.rows)
        if self.soft < 1:
            probs = probs + (1 - self.soft) * (self.draft_tokens[..., None] == mx.arange(self.rows.shape[0]))
        return probs

    def expected(self, matrix: mx.array) -> tuple[mx.array, mx.array]:
        """The mean row of `matrix` under the distribution, (N, T - 1, H), and the distribution's mass (N, T - 1, 1)."""
        probs = self.probs()
        mass = mx.ones((*probs.shape[:2], 1)) if self.soft == 1 else probs.sum(axis=-1, keepdims=True)
        return probs @ matrix, mass


def batch_loss(
    drafter: RecurrentDrafter, batch: Batch, embed: Embed, rows: mx.array, objective: Objective
) -> mx.array:
    """The loss of a batch, a scalar.

    Args:
        rows: (V, H) of the target's output embedding for the drafter's vocabulary.
    """
    size = batch.left.shape[1]
    teacher = Teacher(drafter, batch, rows, objective.soft)
    frozen = drafter.config.head == "factored"
    matrix = rows if frozen else drafter.lm_head[-1].weight
    guide = teacher.expected(matrix) if frozen else (teacher.probs(),)
    head_loss = cross_entropy if frozen else cross_entropy_of_head
    weights = objective.weights(batch)
    loss, reached = mx.array(0.0), mx.array(1.0)
    for depth, features in enumerate(depth_features(drafter, batch, embed, objective.depths)):
        ahead = slice(depth, depth + size)
        held = [each[:, ahead].reshape(-1, each.shape[-1]) for each in guide]
        own = features.reshape(-1, features.shape[-1])
        outputs = head_loss(own, matrix, *held, weights[depth].reshape(-1, 1) * reached)
        loss = loss + outputs[0]
        if objective.reach:
            token = teacher.draft_tokens[:, ahead].reshape(-1, 1)
            logit = (own * matrix[mx.maximum(token[:, 0], 0)]).sum(axis=-1, keepdims=True)
            prob = mx.where(token < 0, 0.0, mx.exp(logit - outputs[-1]) ** objective.reach)
            reached = mx.stop_gradient(reached * prob)
    return loss
