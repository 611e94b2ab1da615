"""The recurrent drafter: Apple's beams (tests/goldens, see its README), copies, and the targets it fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.recurrent import GOLDENS, KINDS, NAMES, embed_from, logits_of
from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.drafters.quantization import quantize
from redrafter_mlx.drafters.recurrent import RecurrentDrafter, full_head
from redrafter_mlx.drafters.recurrent_config import DrafterConfig, changed

SHAPES = [(1, 2), (1, 5), (2, 3), (3, 4), (4, 5), (8, 6), (16, 5)]


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
