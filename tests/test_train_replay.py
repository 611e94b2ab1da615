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
from redrafter_mlx.train.replay import replay
from redrafter_mlx.tree import Beam


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
