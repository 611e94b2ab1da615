"""Predicting the speed-up of every shape of draft from measured costs and acceptance, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from redrafter_mlx.auto import CostTable
from redrafter_mlx.auto.learned import DEFAULTS
from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.generation import Model
from redrafter_mlx.policy import Fixed, Outcome
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import Beam

MAX_WIDE_NODES = 32


@dataclass(frozen=True, slots=True)
class SearchSample:
    """Wide searches on real text: the log-probabilities of their paths, and how often they were accepted."""

    logprobs: list[np.ndarray]
    """(L-1, W) per step"""
    trust: np.ndarray
    """(L-1,) accepted nodes / predicted ones, by depth"""
    tokens_per_step: float


def wide_searches(model: Model, prompts: Sequence[list[int]], max_tokens: int) -> SearchSample:
    """Decode greedily with the widest draft that `auto` knows, keeping the probabilities of every search.

    Raises:
        ValueError: the model has no drafter.
    """
    if model.drafter is None:
        raise ValueError(f"{model.target.name} has no drafter whose searches could be seen")
    width, length = model.target.widest(min(DEFAULTS.wide[0], model.drafter.max_width)), DEFAULTS.wide[1]
    length = min(length, model.drafter.max_length or length)
    beam = Beam(width, length, min(MAX_WIDE_NODES, 1 + width * (length - 1)))
    kept: list[np.ndarray] = []
    predicted, accepted = np.full(beam.length - 1, 1e-6), np.zeros(beam.length - 1)
    steps = 0

    class Recording(Fixed):
        def observe(self, outcome: Outcome) -> None:
            nonlocal steps
            assert outcome.candidates is not None
            kept.append(np.array(outcome.candidates.logprobs).reshape(-1, beam.width))
            probs = np.exp(kept[-1])
            bar = np.sort(probs.reshape(-1))[1 - (beam.nodes or 0)]
            predicted[:] += np.where(probs >= bar, probs, 0).sum(axis=1)
            accepted[: outcome.num_accepted] += 1
            steps += 1

    for prompt in prompts:
        text = Text(
            model.target, model.drafter, model.target.new_cache(), Recording(beam), Sampling(), prompt,
            max_tokens=max_tokens,
        )  # fmt: skip
        prefill(model.target, text, prompt)
        for _ in decode(model.target, text):
            pass
    return SearchSample(kept, accepted / predicted, round(1 + float(accepted.sum()) / steps, 4))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted speed-ups over plain decoding."""

    by_shape: dict[str, float]
    by_nodes: dict[str, float]
    advice: str


def predict(
    table: CostTable,
    sample: SearchSample,
    widths: Sequence[int],
    lengths: Sequence[int],
    budgets: Sequence[int],
) -> Prediction:
    """Expected tokens over expected seconds, for every width x length (all nodes) and every node budget."""
    verify = table.verify_seconds()

    def speedup(width: int, length: int, nodes: int) -> float:
        tokens = 0.0
        for logprobs in sample.logprobs:
            probs = (np.exp(logprobs) * sample.trust[:, None])[: length - 1, :width]
            tokens += 1 + float(np.sort(probs.reshape(-1))[::-1][: nodes - 1].sum())
        seconds = len(sample.logprobs) * (verify[nodes] + table.draft_seconds(width, length))
        return round(tokens / seconds * float(verify[1]), 4)

    by_shape = {f"{w}x{n}": speedup(w, n, 1 + w * (n - 1)) for w in widths for n in lengths}
    height, widest = sample.logprobs[0].shape
    by_nodes = {str(n): speedup(widest, height + 1, n) for n in budgets if n <= 1 + widest * height}
    choices = {
        (w, n, b): speedup(w, n, b) for w in widths for n in lengths for b in budgets if b <= 1 + w * (n - 1)
    }
    (width, length, nodes), best = max(choices.items(), key=lambda item: item[1])
    rows, draft = verify[nodes] / verify[1], table.draft_seconds(width, length) / verify[1]
    why = (
        f"{nodes} rows cost {rows:.2f} plain steps and the draft {draft:.2f}, "
        f"for {best * (rows + draft):.2f} tokens a step"
    )
    if best > 1.02:
        advice = f"auto will draft here, about {width}x{length}@{nodes} ({best:.2f}x predicted): {why}"
    else:
        advice = (
            f"auto will decode plainly here: the best draft, {width}x{length}@{nodes}, is {best:.2f}x: {why}"
        )
    return Prediction(by_shape, by_nodes, advice)
