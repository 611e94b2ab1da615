"""End to end against Apple's reference: same tokens, same beams, same accepted counts."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx as rd

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.generation import Model
from redrafter_mlx.policy import Fixed, Outcome
from redrafter_mlx.tree import Beam, Candidates, chain

SLOW = pytest.mark.slow
GOLDENS = Path(__file__).parent / "goldens" / "e2e"
SHAPES = [pytest.param("1x4", marks=SLOW), "3x4", pytest.param("4x5", marks=SLOW), "8x5"]


@pytest.fixture(scope="module", params=["e00", pytest.param("e01", marks=SLOW)])
def case(request: pytest.FixtureRequest) -> tuple[Model, dict[str, np.ndarray]]:
    folder = GOLDENS / request.param
    return rd.load(folder / "target", folder / "drafter"), dict(np.load(folder / "io.npz"))


def test_last_logits_and_hidden(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, io = case
    for p in range(8):
        tokens = mx.array(io[f"p{p}_prompt"])
        verified = model.target.verify(chain(tokens), model.target.new_cache())
        np.testing.assert_allclose(verified.logits[-1], io[f"p{p}_last_logits"], atol=1e-4)
        np.testing.assert_allclose(verified.contexts[-1], io[f"p{p}_last_hidden"], atol=1e-4)


@pytest.mark.parametrize("draft", ["off", *SHAPES])
def test_greedy_tokens(case: tuple[Model, dict[str, np.ndarray]], draft: str) -> None:
    model, io = case
    for p in range(8):
        _, stats = rd.generate(model, io[f"p{p}_prompt"].tolist(), max_tokens=64, draft=draft)
        assert stats.token_ids == io[f"p{p}_ar_tokens"].tolist()


class Recording(Fixed):
    """Keeps what every step was offered and accepted."""

    def __init__(self, beam: Beam) -> None:
        super().__init__(beam)
        self.steps: list[tuple[set[tuple[int, ...]], int]] = []

    def observe(self, outcome: Outcome) -> None:
        assert outcome.candidates is not None
        self.steps.append((paths(outcome.candidates), outcome.num_accepted))


def paths(candidates: Candidates) -> set[tuple[int, ...]]:
    """The beams that survive, without the root: paths to the greatest depth."""
    tokens, parents = candidates.tokens.tolist(), candidates.parents.tolist()
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return {path for path in found if len(path) == candidates.height}


@pytest.mark.parametrize("draft", SHAPES)
def test_beams_and_accepted(case: tuple[Model, dict[str, np.ndarray]], draft: str) -> None:
    """Step by step, wherever the reference's top-50 cut (which we do not have) changed nothing."""
    model, io = case
    compared = 0
    for p in range(8):
        prompt, policy = io[f"p{p}_prompt"].tolist(), Recording(Beam.parse(draft))
        text = Text(
            model.target,
            model.drafter,
            model.target.new_cache(),
            policy,
            rd.Sampling(),
            prompt,
            max_tokens=64,
        )
        prefill(model.target, text, prompt)
        for _ in decode(model.target, text):
            pass
        key = f"p{p}_{draft}"
        for step, (found, num_accepted) in enumerate(policy.steps):
            if not io[f"{key}_nowarp_beams_equal"][step]:
                continue
            assert found == {tuple(beam[1:]) for beam in io[f"{key}_beams"][step].tolist()}
            assert num_accepted == io[f"{key}_accepted"][step]
            compared += 1
    assert compared > 50
