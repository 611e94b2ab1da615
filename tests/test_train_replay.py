"""Replaying greedy text takes the very steps that decoding takes."""

from __future__ import annotations

import pytest

from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.generation import Model, generate
from redrafter_mlx.stats import Stats
from redrafter_mlx.train.generate import Row, generate_batch
from redrafter_mlx.train.replay import num_accepted, replay
from redrafter_mlx.tree import NEVER, Beam


@pytest.mark.parametrize("draft", ["1x4", "3x4", "3x4@6", "8x5@16"])
def test_replay_is_decoding(draft: str) -> None:
    target = make_target("llama")
    drafter = make_drafter(target, head="factored", num_draft_layers=0)
    weight = np.zeros((target.hidden_size, 2 * target.hidden_size), dtype=np.float32)
    weight[:, : target.hidden_size] = np.eye(target.hidden_size)
    drafter.lm_head[-1].weight = mx.array(weight) * 0.3  # right now and then
    prompt = (5, 9, 33, 2, 17)
    row = Row(prompt, 120, 0.0)
    [text] = generate_batch(target, [row], frozenset(), np.random.default_rng(0), cut_loops=False)
    contexts = np.stack(text.contexts).astype(np.float32)
    found = Stats()
    for accepted in replay(drafter, target.embed, contexts, text.tokens, Beam.parse(draft)):
        found.observe(1, accepted + 1)
    _, stats = generate(Model(target, drafter), list(prompt), max_tokens=120, draft=draft)
    assert stats.token_ids == text.tokens
    assert sum(found.accepted_by_depth) > 0, "a drafter that is never right would prove nothing"
    # the replay ends where the text no longer holds a whole beam
    assert 0 <= stats.steps - found.steps <= Beam.parse(draft).length
    assert found.tokens_per_step == pytest.approx(stats.tokens_per_step, abs=0.05)


def test_only_kept_nodes_and_their_own_children_count() -> None:
    tokens, parents = np.array([7, 8, 1, 1]), np.array([-1, -1, 0, 1])
    logprobs = np.log(np.array([0.6, 0.3, 0.5, 0.1]))

    def accepted(nodes: int, truth: list[int]) -> int:
        return num_accepted(tokens, parents, logprobs, nodes, truth)

    assert accepted(5, [8, 1]) == 2
    assert accepted(4, [8, 1]) == 1, "the child of 8 is not among three candidates"
    assert accepted(5, [9, 1]) == 0
    assert accepted(2, [8]) == 0


def test_what_is_not_offered_does_not_count() -> None:
    logprobs = np.array([-0.1, NEVER])
    assert num_accepted(np.array([7, 8]), np.array([-1, -1]), logprobs, 3, [8]) == 0
