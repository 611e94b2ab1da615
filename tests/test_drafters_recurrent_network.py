"""The network of the recurrent drafter: Apple's states and logits, and layouts that change none of them."""

from __future__ import annotations

import pytest

from tests.recurrent import GOLDENS, KINDS, NAMES, embed_from, logits_of
from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.files import named_weights


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forced_states_and_logits(name: str) -> None:
    drafter, io = load_recurrent(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    embed, tokens = embed_from(io["embedding"]), mx.array(io["tf_tokens"])
    np.testing.assert_allclose(drafter.states(embed(tokens)), io["tf_states"], atol=1e-4)
    logits = drafter.logits(mx.array(io["context"]), tokens, embed)
    np.testing.assert_allclose(logits, io["tf_raw_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_final_weights_changes_no_logits(kind: str) -> None:
    target = make_target()
    drafter = make_drafter(target, **KINDS[kind])
    want, weights = logits_of(drafter, target), named_weights(drafter)
    assert drafter._parts is None, "not while it can train"
    drafter.eval()
    drafter.attach(target)
    assert (drafter._parts is not None) == drafter.has_input_proj
    np.testing.assert_allclose(logits_of(drafter, target), want, rtol=1e-4, atol=1e-4)
    assert all(array is weights[name] for name, array in named_weights(drafter).items())


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_after_the_layout_count(kind: str) -> None:
    """`update`, as an optimizer or `load_weights` calls it, leaves nothing of the old ones behind."""
    target = make_target()
    drafter, other = (make_drafter(target, seed, **KINDS[kind]) for seed in (1, 2))
    drafter.eval()
    drafter.attach(target)
    logits_of(drafter, target)
    drafter.load_weights(list(named_weights(other).items()))
    np.testing.assert_allclose(logits_of(drafter, target), logits_of(other, target), rtol=1e-4, atol=1e-4)


def test_ids_of_a_reduced_vocabulary_and_back() -> None:
    drafter = make_drafter(make_target(), draft_vocab_size=10)
    drafter.d2t = mx.full((10,), 40, dtype=mx.int32)
    ids, own = drafter.target_ids(), drafter.draft_ids()
    assert ids is not None and ids.tolist() == list(range(40, 50))
    assert own.shape == (64,) and own[ids].tolist() == list(range(10)) and int((own >= 0).sum()) == 10
    plain = make_drafter(make_target())
    assert plain.target_ids() is None and plain.draft_ids().tolist() == list(range(64))


def test_a_training_step_changes_the_weights_but_not_the_vocabulary() -> None:
    target = make_target()
    drafter = make_drafter(target, draft_vocab_size=10)
    assert "d2t" in named_weights(drafter)
    assert "d2t" not in dict(tree_flatten(drafter.trainable_parameters()))
