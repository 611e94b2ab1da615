"""Parity with Apple's reference (tests/goldens, see its README) and the drafter's own laws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafter import (
    DrafterConfig,
    RecurrentDrafter,
    full_head,
    load_drafter,
    quantize_drafter,
    save_drafter,
)
from redrafter_mlx.search import search

GOLDENS = Path(__file__).parent / "goldens" / "drafter"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
SHAPES = [(1, 2), (1, 5), (2, 3), (3, 4), (4, 5), (8, 6), (16, 5)]


def embed_from(table: np.ndarray):  # type: ignore[no-untyped-def]
    array = mx.array(table)
    return lambda tokens: array[tokens]


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forced_states_and_logits(name: str) -> None:
    drafter, io = load_drafter(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    embed, tokens = embed_from(io["embedding"]), mx.array(io["tf_tokens"])
    np.testing.assert_allclose(drafter.states(embed(tokens)), io["tf_states"], atol=1e-4)
    logits = drafter.logits(mx.array(io["context"]), tokens, embed)
    np.testing.assert_allclose(logits, io["tf_raw_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_beams(name: str, width: int, length: int) -> None:
    """The generator kept only contexts whose beams have no near-tie, so they must be equal, order included."""
    drafter, io = load_drafter(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    embed, key = embed_from(io["embedding"]), f"{width}x{length}"
    for row, root in enumerate(io["init_tokens"].tolist()):
        hidden = mx.array(io["context"][row])
        beams, logprobs = drafter.beam_search(hidden, root, embed, width, length)
        np.testing.assert_array_equal(beams, io[f"nowarp_beams_{key}"][row])
        np.testing.assert_allclose(logprobs, io[f"nowarp_beam_cum_logprobs_{key}"][row], atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 20}, {"exit_dim": 24, "num_draft_layers": 2}])
def test_factored_head_exports_exactly(changes: dict[str, int]) -> None:
    target = make_target()
    drafter = make_drafter(target, head="factored", **changes)
    if "draft_vocab_size" in changes:
        drafter.d2t = mx.arange(20, dtype=mx.int32)  # draft id i is target id 2 i
        drafter.bind(target)
        assert drafter.target_ids().tolist() == list(range(0, 40, 2))
    full = full_head(drafter)
    assert full.config.head == "full" and full.is_bound
    hidden, tokens = mx.random.normal((3, 32)), mx.array([[1, 2], [3, 4], [5, 6]])
    mine = drafter.logits(hidden, tokens, target.embed)
    np.testing.assert_allclose(mine, full.logits(hidden, tokens, target.embed), atol=1e-4)


def test_unbound_factored_head_is_refused() -> None:
    drafter = RecurrentDrafter(DrafterConfig(64, 32, 64, 1, head="factored"))
    with pytest.raises(ValueError, match="must be bound"):
        drafter.logits(mx.zeros((1, 32)), mx.array([[1]]), make_target().embed)


def test_save_and_load(tmp_path: Path) -> None:
    target = make_target()
    drafter = make_drafter(
        target,
        head="factored",
        context_layers=(1,),
        draft_vocab_size=32,
        calibration=(1.1, 1.2),
        exit_dim=48,
    )
    save_drafter(drafter, tmp_path / "d", extra=[("README.md", "card")])
    again = load_drafter(tmp_path / "d")
    assert again.config == drafter.config
    for (name, a), (_, b) in zip(
        tree_flatten(drafter.parameters()), tree_flatten(again.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_quantised_drafter_round_trip(tmp_path: Path) -> None:
    from dataclasses import asdict

    target = make_target()
    drafter = make_drafter(target)
    hidden, tokens = mx.random.normal((2, 32)), mx.array([[1, 2], [3, 4]])
    want = drafter.logits(hidden, tokens, target.embed)
    quantize_drafter(drafter, bits=8, group_size=32)
    drafter.config = DrafterConfig(
        **{**asdict(drafter.config), "quantization": {"bits": 8, "group_size": 32}}
    )
    save_drafter(drafter, tmp_path / "q")
    got = load_drafter(tmp_path / "q").logits(hidden, tokens, target.embed)
    assert mx.abs(got - want).max().item() < 0.05 * mx.abs(want).max().item()


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"exit_dim": 0}, "exit_dim must be a positive integer"),
        ({"head": "half"}, "head must be 'full' or 'factored'"),
        ({"activation": "relu"}, "activation must be"),
        ({"model_type": "llama"}, "is not a drafter"),
        ({"num_draft_layers": 2}, "lm_head.1.linear.weight .* is missing.*lm_head.2.weight"),
        ({"rnn": False}, "rnn_u.bias .* is not expected.*rnn_w.weight"),
        ({"vocab_size": 65}, "lm_head.1.weight has shape .*expected"),
    ],
)
def test_bad_config_is_one_clear_error(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    target = make_target()
    save_drafter(make_drafter(target), tmp_path / "d")
    edit(tmp_path / "d", **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path / "d")


def test_damaged_files(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save_drafter(make_drafter(make_target()), folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for keep in (4, 100, len(data) - 1):
        weights.write_bytes(data[:keep])
        with pytest.raises(ValueError, match="cut short"):
            load_drafter(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_drafter(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_drafter(folder)


def test_unknown_keys_are_listed(tmp_path: Path) -> None:
    save_drafter(make_drafter(make_target()), tmp_path / "d")
    edit(tmp_path / "d", colour="red", emb_norm=False)
    with pytest.warns(UserWarning, match="colour$"):
        load_drafter(tmp_path / "d")


def test_another_targets_drafter_is_refused() -> None:
    target = make_target()
    for sizes, message in (((64, 16), "hidden_size is 16"), ((65, 32), "vocab_size is 65")):
        drafter = RecurrentDrafter(DrafterConfig(sizes[0], sizes[1], 64, 1))
        with pytest.raises(ValueError, match=message):
            drafter.bind(target)


def test_reduced_vocabulary_drafts_target_ids() -> None:
    target = make_target()
    drafter = make_drafter(target, draft_vocab_size=10)
    drafter.d2t = mx.full((10,), 40, dtype=mx.int32)
    beams, _ = drafter.beam_search(mx.random.normal((32,)), 3, target.embed, 4, 4)
    drafted = beams[:, 1:].reshape(-1).tolist()
    assert all(40 <= token < 50 for token in drafted)
    with pytest.raises(ValueError, match="at most the drafter's vocabulary 10"):
        drafter.beam_search(mx.random.normal((32,)), 3, target.embed, 11, 4)


def test_calibration_changes_probabilities_not_order() -> None:
    target = make_target()
    drafter = make_drafter(target)
    hidden = mx.random.normal((32,))
    plain, before = drafter.beam_search(hidden, 3, target.embed, 1, 4)
    drafter.config = DrafterConfig(64, 32, 64, 1, calibration=(2.0, 2.0, 2.0))
    same, after = drafter.beam_search(hidden, 3, target.embed, 1, 4)
    assert mx.array_equal(plain, same) and not mx.allclose(before, after)


def test_noise_is_added_to_calibrated_logits() -> None:
    """One beam follows argmax(logits / c + noise), each depth with its own c."""
    target = make_target()
    drafter = make_drafter(target)
    drafter.config = DrafterConfig(64, 32, 64, 1, calibration=(0.1, 3.0))
    hidden, root = mx.random.normal((32,)), mx.array(3, dtype=mx.int32)
    noise = mx.random.gumbel((3, 64))
    levels = search(drafter, hidden, root, target.embed, width=1, length=4, noise=noise)
    drafted = [3, *levels.tokens.reshape(-1).tolist()]  # type: ignore[misc]
    logits = drafter.logits(hidden[None], mx.array([drafted[:3]]), target.embed)[0]
    for depth, c in enumerate((0.1, 3.0, 1.0)):  # beyond what was calibrated: as they are
        assert drafted[depth + 1] == int(mx.argmax(logits[depth] / c + noise[depth]))
