"""The training objective: to guess, several tokens ahead, what the target would say.

At a position j of a text the target has just chosen token a[j] (the root) from context c[j]. Depth i of the drafter is
fed a[j] .. a[j+i] and guesses a[j+1+i]. Its teacher there is the target's own distribution, softmax(rows c[j+1+i]) over
the drafter's vocabulary (soft targets), or the token itself (hard targets); what a guess is worth against it is in
`criteria`. All depths and positions are computed at once, teacher forced; logits exist for one block of rows at a time.

Source: ReDrafter paper (arXiv 2403.09919) section 3.3, "local distillation"; the soft form is Hinton et al.,
1503.02531.

Letters: N windows, P positions in a window, K depths, T = P + K, C context size, H hidden size, V the drafter's
vocabulary, M rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from redrafter_mlx.drafters.interface import Embed
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.kernels import silu
from redrafter_mlx.tree import MAX_NODES

from .criteria import LOSSES, Loss, frozen_head_kl, head_loss, softmax

DepthWeights = Literal["decay", "dpace"]
DEPTH_WEIGHTS: tuple[DepthWeights, ...] = ("decay", "dpace")


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
    """With the loss `kl`: weight of the target's distribution; the rest is on the token itself."""
    decay: float = 0.8
    """Weight of a depth relative to the one before: a later guess counts only if the earlier ones were accepted."""
    reach: float = 0.0
    """A depth also weighs p^reach, p being the probability that the drafter itself gave to the tokens before it:
    1 trains each depth where the drafter's own guesses would get there, 0 everywhere alike."""
    loss: Loss = "kl"
    """What a guess is worth, see `criteria`."""
    depth_weights: DepthWeights = "decay"
    """What a depth weighs: "decay", by `decay` and `reach`; "dpace", by what it adds to the expected accepted length,
    see `_dpace`."""

    def __post_init__(self) -> None:
        if not 1 <= self.depths < MAX_NODES:
            raise ValueError(f"depths must be between 1 and {MAX_NODES - 1}, not {self.depths}")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft must be between 0 and 1, not {self.soft}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {self.decay}")
        if not 0 <= self.reach <= 1:
            raise ValueError(f"reach must be between 0 and 1, not {self.reach}")
        for name, known in (("loss", LOSSES), ("depth_weights", DEPTH_WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.loss != "kl" and self.soft != 1:
            raise ValueError(f"soft {self.soft} is for the loss kl; {self.loss} has its own mixture")
        if self.depth_weights == "dpace" and self.reach:
            raise ValueError(f"reach {self.reach} is for the depth weights decay; dpace has its own")

    @classmethod
    def parse(cls, length: int, soft: float, reach: float, loss: str, depth_weights: str) -> Objective:
        """From the options of the command line, beam length `length` counting the root.

        Raises:
            ValueError: an option that cannot be.
        """
        if not 2 <= length <= MAX_NODES:
            raise ValueError(f"--length counts the root and must be between 2 and {MAX_NODES}, not {length}")
        found: Loss | None = next((name for name in LOSSES if name == loss), None)
        weights: DepthWeights | None = next((name for name in DEPTH_WEIGHTS if name == depth_weights), None)
        if found is None:
            raise ValueError(f"--loss must be one of {', '.join(LOSSES)}, not {loss!r}")
        if weights is None:
            raise ValueError(
                f"--depth-weights must be one of {', '.join(DEPTH_WEIGHTS)}, not {depth_weights!r}"
            )
        return cls(depths=length - 1, soft=soft, reach=reach, loss=found, depth_weights=weights)

    @property
    def needs_belief(self) -> bool:
        """True if the weights depend on what the drafter believes."""
        return bool(self.reach) or self.depth_weights == "dpace"

    def weights(self, batch: Batch, belief: mx.array | None = None) -> mx.array:
        """(K, N, P): weight of every guess. By `decay` alone they sum to 1, or to 0 if none counts.

        Args:
            belief: (K, N, P), the probability that the drafter gives to the token of the text; for `needs_belief`.
        """
        if self.depth_weights == "dpace":
            assert belief is not None
            weights = _dpace(batch, belief)
        else:
            weights = self._raw_weights(batch)
            if self.reach:
                assert belief is not None
                reached = mx.cumprod(belief**self.reach, axis=0)
                weights = weights * mx.concatenate([mx.ones_like(reached[:1]), reached[:-1]])
        total = self._raw_weights(batch).sum() if batch.weight_sum is None else batch.weight_sum
        return weights / mx.maximum(total, 1e-6)

    def share(self, batch: Batch, rank: int, size: int) -> Batch:
        """The windows of one of `size` processes; the mean of the processes' losses is the loss of the batch."""
        own = slice(rank, None, size)
        total = self._raw_weights(batch).sum() / size
        return Batch(batch.contexts[own], batch.tokens[own], batch.left[own], total)

    def _raw_weights(self, batch: Batch) -> mx.array:
        """(K, N, P): weights by depth alone, before those that the drafter's belief decides."""
        depth = mx.arange(self.depths)[:, None, None]
        decay = self.decay if self.depth_weights == "decay" else 1.0
        return mx.where(batch.left[None] > depth, decay ** depth.astype(mx.float32), 0.0)


DPACE_FLOOR = 0.5


def _dpace(batch: Batch, belief: mx.array) -> mx.array:
    """Weights (K, N, P) of D-PACE (arXiv 2605.18810): depth i weighs the sum over j >= i of the product of b up to j.

    That is the gradient of the expected accepted length, sum_j of the product of q_k up to j, by log q_i. For q the
    drafter's own probability of the token of the text stands in, raised to b = 1/2 + q/2 because a drafter that
    believes nothing yet would otherwise train its first depth alone.
    """
    depth = mx.arange(belief.shape[0])[:, None, None]
    reached = mx.cumprod((1 - DPACE_FLOOR) * belief + DPACE_FLOOR, axis=0)
    counted = mx.where(batch.left[None] > depth, reached, 0.0)
    return mx.cumsum(counted, axis=0, reverse=True)


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


def teacher_probs(contexts: mx.array, rows: mx.array) -> mx.array:
    """The target's distribution over the drafter's vocabulary: (..., C or H) and rows (V, H) -> (..., V)."""
    return softmax(contexts[..., : rows.shape[1]] @ rows.T)[0]


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
    is_frozen = drafter.config.head == "factored"
    matrix = rows if is_frozen else drafter.lm_head[-1].weight
    if is_frozen and objective.loss == "kl":
        loss_of_rows, guide = frozen_head_kl, teacher.expected(matrix)
    else:
        loss_of_rows = head_loss(objective.loss, is_frozen)
        guide = teacher.probs(), teacher.draft_tokens[..., None]
    losses, believed = [], []
    for depth, features in enumerate(depth_features(drafter, batch, embed, objective.depths)):
        ahead = slice(depth, depth + size)
        held = [each[:, ahead].reshape(-1, each.shape[-1]) for each in guide]
        own = features.reshape(-1, features.shape[-1])
        row_losses, _, normalizers = loss_of_rows(own, matrix, *held)
        losses.append(row_losses)
        if objective.needs_belief:
            token = teacher.draft_tokens[:, ahead].reshape(-1, 1)
            logit = (own * matrix[mx.maximum(token[:, 0], 0)]).sum(axis=-1, keepdims=True)
            believed.append(mx.where(token < 0, 0.0, mx.exp(logit - normalizers)))
    belief = mx.stop_gradient(mx.stack(believed)) if believed else None
    shape = (objective.depths, *batch.left.shape)
    weights = objective.weights(batch, None if belief is None else belief.reshape(shape))
    return (weights.reshape(objective.depths, -1, 1) * mx.stack(losses)).sum()
