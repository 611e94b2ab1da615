"""End to end against Apple's reference: same tokens, same beams, same accepted counts."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx as rd

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx import decode
from redrafter_mlx import search as search_module
from redrafter_mlx.generation import Model
from redrafter_mlx.tree import chain

GOLDENS = Path(__file__).parent / "goldens" / "e2e"
SHAPES = ["1x4", "3x4", "4x5", "8x5"]


@pytest.fixture(scope="module", params=["e00", "e01"])
def case(request: pytest.FixtureRequest) -> tuple[Model, dict[str, np.ndarray]]:
    folder = GOLDENS / request.param
    return rd.load(folder / "target", folder / "drafter"), dict(np.load(folder / "io.npz"))


def test_last_logits_and_hidden(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, io = case
    for p in range(8):
        tokens = mx.array(io[f"p{p}_prompt"])
        verified = model.target.verify(chain(tokens), model.target.new_cache())
        np.testing.assert_allclose(verified.logits[-1], io[f"p{p}_last_logits"], atol=1e-4)
        np.testing.assert_allclose(verified.hidden[-1], io[f"p{p}_last_hidden"], atol=1e-4)


@pytest.mark.parametrize("draft", ["off", *SHAPES])
def test_greedy_tokens(case: tuple[Model, dict[str, np.ndarray]], draft: str) -> None:
    model, io = case
    for p in range(8):
        _, stats = rd.generate(model, io[f"p{p}_prompt"].tolist(), max_tokens=64, draft=draft)
        assert stats.token_ids == io[f"p{p}_ar_tokens"].tolist()


@pytest.mark.parametrize("draft", SHAPES)
def test_beams_and_accepted(
    case: tuple[Model, dict[str, np.ndarray]], draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, wherever the reference's top-50 cut (which we do not have) changed nothing."""
    model, io = case
    seen: list[tuple[np.ndarray, int]] = []
    queued: list[np.ndarray] = []
    original_search, original_observe = search_module.search, decode.Stats.observe

    def search(drafter, context, root, embed, **options):  # type: ignore[no-untyped-def]
        levels = original_search(drafter, context, root, embed, **options)
        queued.append(np.array(search_module.beams_of(levels, int(root.item()))[0]))
        return levels

    def observe(self, nodes, num_accepted):  # type: ignore[no-untyped-def]
        seen.append((queued[len(seen)], num_accepted))
        original_observe(self, nodes, num_accepted)

    monkeypatch.setattr(decode, "search", search)
    monkeypatch.setattr(decode.Stats, "observe", observe)
    compared = 0
    for p in range(8):
        seen.clear(), queued.clear()
        rd.generate(model, io[f"p{p}_prompt"].tolist(), max_tokens=64, draft=draft)
        key = f"p{p}_{draft}"
        for step, (beams, num_accepted) in enumerate(seen):
            if not io[f"{key}_nowarp_beams_equal"][step]:
                continue
            want = io[f"{key}_beams"][step]
            assert {tuple(b) for b in beams.tolist()} == {tuple(b) for b in want.tolist()}
            assert num_accepted == io[f"{key}_accepted"][step]
            compared += 1
    assert compared > 50
