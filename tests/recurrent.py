"""Recurrent drafters of every kind of head and projection, Apple's goldens, and the logits of a fixed input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redrafter_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.interface import Embed
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.target import Target

GOLDENS = Path(__file__).parent / "goldens" / "drafter"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
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


def random_input(drafter: RecurrentDrafter) -> tuple[mx.array, mx.array]:
    """Contexts (3, C) and tokens (3, 2)."""
    hidden = mx.random.normal((3, drafter.config.context_size), key=mx.random.key(7))
    return hidden, mx.array([[1, 2], [3, 4], [5, 6]])


def logits_of(drafter: RecurrentDrafter, target: Target) -> np.ndarray[Any, Any]:
    return np.array(drafter.logits(*random_input(drafter), target.embed))
