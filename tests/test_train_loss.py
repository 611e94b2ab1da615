"""The objective: what depths weigh, and the loss of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redrafter_mlx.target import Target
from redrafter_mlx.train.corpus import Corpus
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.loss import Batch, Objective, batch_loss, depth_features

from .toy import HIDDEN, VOCAB, make_target
from .training import LAYERS, a_batch, attached, config, write_corpus

# isort: split
import mlx.core as mx


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rnn": False},
        {"activation": "linear"},
        {"head": "full"},
        {"exit_dim": 4 * HIDDEN},  # no input_proj
        {"num_draft_layers": 0},
    ],
)
def test_training_computes_what_drafting_computes(
    target: Target, data: Path, changes: dict[str, Any]
) -> None:
    batch = a_batch(data)
    drafter = attached(target, **changes)
    got = depth_features(drafter, batch, target.embed, 3)
    for position in (0, 5):
        hidden = batch.contexts[:, position]
        tokens = batch.tokens[:, position : position + 3]
        want = drafter.logits(hidden, tokens, target.embed)
        for depth in range(3):
            mine = drafter.head(got[depth][:, position])
            np.testing.assert_allclose(np.array(mine), np.array(want[:, depth]), atol=1e-4)


def test_depths_past_the_end_of_a_text_do_not_count() -> None:
    batch = Batch(mx.zeros((1, 5, 4)), mx.zeros((1, 5), dtype=mx.int32), mx.array([[3, 1, 0]]))
    weights = Objective(depths=2, decay=0.5).weights(batch)
    # depth 0 counts where a token follows, depth 1 where two do; 1 + 1 + 0.5 in all
    np.testing.assert_allclose(np.array(weights[:, 0]), np.array([[1, 1, 0], [0.5, 0, 0]]) / 2.5)


def test_soft_targets_are_the_targets_distribution(target: Target, data: Path) -> None:
    """A drafter cannot do better than the entropy of what it imitates; hard targets are the token
    itself."""
    batch = a_batch(data)
    drafter = attached(target, draft_vocab_size=None)
    rows = target.output_rows()
    losses = {
        soft: batch_loss(drafter, batch, target.embed, rows, Objective(depths=1, soft=soft)).item()
        for soft in (0.0, 0.25, 1.0)
    }
    features = depth_features(drafter, batch, target.embed, 1)[0]
    logits = features @ rows.T
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    probs = mx.softmax(batch.contexts[:, 1:9, :HIDDEN] @ rows.T, axis=-1)
    counted = batch.left > 0
    soft = -((probs * logprobs).sum(axis=-1) * counted).sum() / counted.sum()
    token_logprobs = mx.take_along_axis(logprobs, batch.tokens[:, 1:9, None], axis=-1)[..., 0]
    hard = -(token_logprobs * counted).sum() / counted.sum()
    assert losses[1.0] == pytest.approx(soft.item(), rel=1e-4)
    assert losses[0.0] == pytest.approx(hard.item(), rel=1e-4)
    assert losses[0.25] == pytest.approx(0.25 * soft.item() + 0.75 * hard.item(), rel=1e-4)


@pytest.mark.parametrize("changes", [{"draft_vocab_size": 30}, {"draft_vocab_size": None, "head": "full"}])
def test_reach_weighs_a_depth_by_the_drafters_own_guesses(
    target: Target, data: Path, changes: dict[str, Any]
) -> None:
    """Depth 1 counts as much as the drafter believed in the token of depth 0: not at all where it lacks it."""
    batch = a_batch(data, 2)
    made = new_drafter(config(**changes), target, Corpus([data]))
    rows = target.output_rows(made.target_ids())
    ids = np.arange(VOCAB) if made.target_ids() is None else np.array(made.target_ids())
    features = depth_features(made, batch, target.embed, 2)
    weights = np.array(Objective(depths=2).weights(batch))
    want, reached = 0.0, np.ones(batch.left.shape)
    for depth in range(2):
        tokens = np.array(batch.tokens[:, 1 + depth : 1 + depth + batch.left.shape[1]])
        logprobs = np.array(mx.log(mx.softmax(made.head(features[depth]), axis=-1)))
        known = np.isin(tokens, ids)
        column = np.array([[list(ids).index(t) if t in ids else 0 for t in row] for row in tokens])
        chosen = np.take_along_axis(logprobs, column[..., None], axis=-1)[..., 0]
        want -= float((weights[depth] * reached * np.where(known, chosen, 0)).sum())
        reached = reached * np.where(known, np.exp(chosen) ** 0.5, 0)
    got = batch_loss(made, batch, target.embed, rows, Objective(depths=2, soft=0.0, reach=0.5))
    assert got.item() == pytest.approx(want, rel=1e-4)
    with pytest.raises(ValueError, match="reach must be between 0 and 1, not 2"):
        Objective(reach=2)


@pytest.mark.parametrize("head", ["factored", "full"])
def test_dpace_weighs_a_depth_by_what_it_adds_to_the_accepted_length(
    target: Target,
    data: Path,
    head: str,
) -> None:
    """Written out: b_k = (1 + q_k) / 2, and depth i weighs the sum over j >= i of b_0 ... b_j."""
    batch = a_batch(data, 3)
    made = new_drafter(config(head=head), target, Corpus([data]))
    rows, ids = target.output_rows(made.target_ids()), np.array(made.target_ids()).tolist()
    left, size = np.array(batch.left), batch.left.shape[1]
    entropies, beliefs = [], []
    for depth, features in enumerate(depth_features(made, batch, target.embed, 3)):
        tokens = np.array(batch.tokens[:, 1 + depth : 1 + depth + size])
        guess = np.array(mx.softmax(made.head(features), axis=-1))
        own = [
            [guess[n, t, ids.index(a)] if a in ids else 0 for t, a in enumerate(row)]
            for n, row in enumerate(tokens)
        ]
        beliefs.append(np.array(own))
        entropies.append(-np.log(np.where(beliefs[-1] > 0, beliefs[-1], 1)))
    want = 0.0
    for n, t in np.ndindex(left.shape):
        for i in range(3):
            weight = sum(
                np.prod([0.5 + 0.5 * beliefs[k][n, t] for k in range(j + 1)])
                for j in range(i, 3)
                if left[n, t] > j
            )
            want += weight * entropies[i][n, t]
    want /= sum((left > depth).sum() for depth in range(3))
    objective = Objective(depths=3, soft=0.0, depth_weights="dpace")
    assert batch_loss(made, batch, target.embed, rows, objective).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("loss", ["tv", "gumbel"])  # the share of lk is a constant of its gradient
def test_every_loss_trains_every_head(target: Target, data: Path, loss: Any) -> None:
    """Its gradient is that of its own finite differences, through all depths and both kinds of head."""
    batch = a_batch(data, 2)
    for head in ("factored", "full"):
        made = new_drafter(config(head=head), target, Corpus([data]))
        rows, weights = target.output_rows(made.target_ids()), made.trainable_parameters()
        objective = Objective(depths=2, loss=loss)

        def value(weights: Any) -> mx.array:
            made.update(weights)  # noqa: B023
            return batch_loss(made, batch, target.embed, rows, objective)  # noqa: B023

        gradients = mx.grad(value)(weights)
        name, step = "lm_head", 3e-3
        direction = mx.random.normal(weights[name][-1]["weight"].shape, key=mx.random.key(0))
        moved = []
        for sign in (1, -1):
            changed = {
                **weights,
                name: [
                    *weights[name][:-1],
                    {"weight": weights[name][-1]["weight"] + sign * step * direction},
                ],
            }
            moved.append(value(changed).item())
        slope = (gradients[name][-1]["weight"] * direction).sum().item()
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.05, abs=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "loss must be one of kl, tv, lk, gumbel, not 'mse'"),
        ({"depth_weights": "none"}, "depth_weights must be one of decay, dpace, not 'none'"),
        ({"loss": "tv", "soft": 0.5}, "soft 0.5 is for the loss kl; tv has its own mixture"),
        ({"depth_weights": "dpace", "reach": 1.0}, "reach 1.0 is for the depth weights decay"),
    ],
)
def test_objectives_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**changes)
