"""Random speculators, the names their tensors have where they are published, and their formulas in NumPy."""

from __future__ import annotations

import math
from typing import Any

from tests.toy import HIDDEN, VOCAB

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from redrafter_mlx.drafters.speculator import Speculator, SpeculatorConfig
from redrafter_mlx.files import named_weights

Arrays = dict[str, np.ndarray]

GATES = ("forget", "input", "output", "cell")

CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp_scaled": {"scale_input": True},
    "mlp_tied": {"tie_weights": True},
    "mlp_one_stage": {"n_predict": 1},
    "lstm": {"method": "sum_lstm", "tie_weights": True},
    "lstm_tied": {"method": "sum_lstm", "tie_weights": True, "tie_lstm_embs": True},
    "lstm_scaled": {"method": "sum_lstm", "tie_weights": True, "tie_lstm_embs": True, "scale_input": True},
}
"""Name -> what its config has beyond the sizes."""


def make_speculator(seed: int = 2, **changes: Any) -> Speculator:
    """A speculator whose every weight is random, its normalizations' too."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "inner_size": 48, "n_predict": 3}
    mx.random.seed(seed)
    speculator = Speculator(SpeculatorConfig(**{**sizes, **changes}))
    speculator.update(tree_map(lambda a: 0.5 * mx.random.normal(a.shape), speculator.parameters()))
    return speculator


def published(speculator: Speculator) -> Arrays:
    """Its tensors under the names of a published checkpoint, with the copies that a PyTorch file holds of tied ones."""
    config, weights = speculator.config, named_weights(speculator)
    found: Arrays = {}
    stages = range(config.n_predict)
    for name, array in weights.items():
        kind, index, *_ = name.split(".")
        values = np.array(array)
        if config.method == "sum_lstm" and kind in ("emb", "proj"):
            axis = 1 if kind == "emb" else 0
            parts = [values] * 4 if kind == "emb" and config.tie_lstm_embs else np.split(values, 4, axis)
            found |= {f"{g}_{kind}.{index}.weight": part for g, part in zip(GATES, parts, strict=True)}
        elif kind in ("cell_ln", "state_ln"):
            found[f"{kind}.0.{index}"] = values
        elif config.tie_weights:
            copies = [i for i in stages if (min(i, 1) if kind == "proj" else 0) == int(index)]
            found |= {name.replace(f".{index}.", f".{i}."): values for i in copies}
        else:
            found[name] = values
    return found


def reference(
    config: SpeculatorConfig, tensors: Arrays, context: np.ndarray, tokens: list[int]
) -> np.ndarray:
    """Logits (n, V) of stages 0 ... n-1 after tokens (n,), the root first; in float64, from published names."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    kept = 0.5 ** (0.5 / config.n_predict)
    alpha = math.sqrt((1 - kept**2) * (config.inner_size / 2)) / kept
    state = context.astype(np.float64)
    if config.scale_input:
        state = _rms(state) / math.sqrt(2)
    cell, rows = np.zeros(config.inner_size), []
    for i, token in enumerate(tokens):
        if config.method == "sum_rnn":
            x = t[f"proj.{i}.weight"] @ state + alpha * t[f"emb.{i}.weight"][token]
            state = _gelu(_rms(x) * t[f"ln.{i}.weight"] + t[f"ln.{i}.bias"])
        else:
            forget, enter, leave, new = (
                t[f"{gate}_proj.{min(i, 1)}.weight"] @ state + alpha * t[f"{gate}_emb.0.weight"][token]
                for gate in GATES
            )
            new = _gelu(_rms(new) * t["cell_ln.0.weight"] + t["cell_ln.0.bias"])
            cell = cell * _sigmoid(forget) + new * _sigmoid(enter)
            state = _gelu(_rms(cell) * t["state_ln.0.weight"] + t["state_ln.0.bias"]) * _sigmoid(leave)
        rows.append(t[f"head.{i}.weight"] @ state)
    return np.stack(rows)


def _rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + 1e-6)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
