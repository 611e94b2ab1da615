"""The recurrent drafter: parity with Apple's reference (tests/goldens, see its README) and its own laws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from redrafter_mlx.drafters.interface import Embed
from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.drafters.recurrent import (
    DrafterConfig,
    RecurrentDrafter,
    changed,
    full_head,
    quantize,
)
from redrafter_mlx.files import named_weights
from redrafter_mlx.target import Target

GOLDENS = Path(__file__).parent / "goldens" / "drafter"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
SHAPES = [(1, 2), (1, 5), (2, 3), (3, 4), (4, 5), (8, 6), (16, 5)]
KINDS: dict[str, dict[str, Any]] = {
    "apple": {},
    "factored": {"head": "factored"},
    "projected": {"exit_dim": 48, "num_draft_layers": 2},
    "projected, factored, three contexts": {"exit_dim": 48, "head": "factored", "context_layers": (0, 2)},
    "sums": {"rnn": False},
    "TensorRT's": {"activation": "linear"},
}


def embed_from(table: np.ndarray[Any, Any]) -> Embed:
    array = mx.array(table)
    return lambda tokens: array[tokens]


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forced_states_and_logits(name: str) -> None:
    drafter, io = load_recurrent(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    embed, tokens = embed_from(io["embedding"]), mx.array(io["tf_tokens"])
    np.testing.assert_allclose(drafter.states(embed(tokens)), io["tf_states"], atol=1e-4)
    logits = drafter.logits(mx.array(io["context"]), tokens, embed)
    np.testing.assert_allclose(logits, io["tf_raw_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_beams(name: str, width: int, length: int) -> None:
    """The generator kept only contexts whose beams have no near-tie, so they must be equal, order included."""
    drafter, io = load_recurrent(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    embed, key = embed_from(io["embedding"]), f"{width}x{length}"
    for row, root in enumerate(io["init_tokens"].tolist()):
        hidden = mx.array(io["context"][row])
        beams, logprobs = drafter.beam_search(hidden, root, embed, width, length)
        np.testing.assert_array_equal(beams, io[f"nowarp_beams_{key}"][row])
        np.testing.assert_allclose(logprobs, io[f"nowarp_beam_cum_logprobs_{key}"][row], atol=1e-3)


def random_input(drafter: RecurrentDrafter) -> tuple[mx.array, mx.array]:
    """Contexts (3, C) and tokens (3, 2)."""
    hidden = mx.random.normal((3, drafter.config.context_size), key=mx.random.key(7))
    return hidden, mx.array([[1, 2], [3, 4], [5, 6]])


def logits_of(drafter: RecurrentDrafter, target: Target) -> np.ndarray[Any, Any]:
    return np.array(drafter.logits(*random_input(drafter), target.embed))


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_copy_searches_while_the_original_trains(kind: str) -> None:
    target = make_target()
    drafter = make_drafter(target, **KINDS[kind])
    want = logits_of(drafter, target)
    frozen = drafter.frozen()
    assert not frozen.training and drafter.training and frozen.config == drafter.config
    drafter.update(tree_map(lambda array: array * 2, drafter.parameters()))
    np.testing.assert_allclose(logits_of(frozen, target), want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits_of(drafter, target), want, rtol=1e-2, atol=1e-2)


def test_a_frozen_copy_of_a_quantized_drafter() -> None:
    target = make_target()
    drafter = make_drafter(target)
    quantize(drafter, {"bits": 8, "group_size": 32})
    drafter.config = changed(drafter.config, quantization={"bits": 8, "group_size": 32})
    np.testing.assert_array_equal(logits_of(drafter.frozen(), target), logits_of(drafter, target))


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 20}, {"exit_dim": 24, "num_draft_layers": 2}])
def test_factored_head_exports_exactly(changes: dict[str, int]) -> None:
    target = make_target()
    drafter = make_drafter(target, head="factored", **changes)
    if "draft_vocab_size" in changes:
        drafter.d2t = mx.arange(20, dtype=mx.int32)  # draft id i is target id 2 i
        drafter.attach(target)
        ids = drafter.target_ids()
        assert ids is not None and ids.tolist() == list(range(0, 40, 2))
    full = full_head(drafter)
    assert full.config.head == "full" and full_head(full) is full
    np.testing.assert_allclose(logits_of(drafter, target), logits_of(full, target), atol=1e-4)


@pytest.mark.parametrize(
    "use",
    [
        lambda drafter: drafter.logits(mx.zeros((1, 32)), mx.array([[1]]), make_target().embed),
        full_head,
        lambda drafter: drafter.recurrence(),
    ],
)
def test_a_drafter_without_its_target_is_refused(use: Callable[[RecurrentDrafter], object]) -> None:
    drafter = RecurrentDrafter(DrafterConfig(64, 32, 64, 1, head="factored"))
    with pytest.raises(ValueError, match=r"must be attached to its target.*attach\(target\)"):
        use(drafter)


def test_another_targets_drafter_is_refused() -> None:
    target = make_target()
    for sizes, message in (((64, 16), "hidden_size is 16"), ((65, 32), "vocab_size is 65")):
        drafter = RecurrentDrafter(DrafterConfig(sizes[0], sizes[1], 64, 1))
        with pytest.raises(ValueError, match=message):
            drafter.attach(target)


def test_another_embedding_scale_is_refused() -> None:
    target = make_target("gemma")
    fits = DrafterConfig(64, 32, 64, 1, embedding_scale=target.embedding_scale, target={"name": "tiny"})
    RecurrentDrafter(fits).attach(target)
    with pytest.raises(ValueError, match=r"trained on embeddings scaled by 1\.0, tiny-gemma scales by 5\.65"):
        RecurrentDrafter(changed(fits, embedding_scale=1.0)).attach(target)


def test_attaching_watches_the_layers_of_the_context() -> None:
    target = make_target()
    make_drafter(target, context_layers=(2, 0))
    assert target.context_layers == (2, 0)
    make_drafter(target)
    assert not target.context_layers
    with pytest.raises(ValueError, match=r"context_layers must lie in 0\.\.2"):
        make_drafter(target, context_layers=(3,))


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


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 0}, {"hidden_size": -1}, {"exit_dim": 1 << 25}, {"exit_dim": True},
        {"num_draft_layers": -1}, {"head": "half"}, {"activation": "relu"}, {"draft_vocab_size": 65},
        {"draft_vocab_size": 0}, {"calibration": (1.0, 0.0)}, {"context_layers": (-1,)},
        {"quantization": {"bits": 7, "group_size": 32}},
    ],
)  # fmt: skip
def test_a_config_checks_itself(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DrafterConfig(**{"vocab_size": 64, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 1} | values)


def test_a_config_as_json_and_back() -> None:
    config = DrafterConfig(
        64, 32, 48, 0, rnn=False, head="factored", draft_vocab_size=9, context_layers=(1, 2), calibration=(1.5,),
        quantization={"bits": 4, "group_size": 32}, target={"name": "tiny"},
    )  # fmt: skip
    values = config.to_dict()
    assert DrafterConfig.from_dict(values, "here") == (config, [])
    assert values["rnn"] is False and values["num_draft_layers"] == 0
    assert "calibration" not in DrafterConfig(64, 32, 64, 1).to_dict(), "Apple's code reads these too"
    with pytest.raises(ValueError, match="here is not a recurrent drafter"):
        DrafterConfig.from_dict({**values, "model_type": "llama"}, "here")
