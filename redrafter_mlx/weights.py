"""A module's weights by name, and checking a file's tensors against them."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named(module: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its dotted name."""
    return cast(dict[str, mx.array], dict(tree_flatten(module.parameters())))


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(array.nbytes for array in named(module).values())


def check(module: nn.Module, weights: dict[str, mx.array], where: str) -> None:
    """Compare every tensor's name and shape with what the module has.

    Raises:
        ValueError: all that is missing, superfluous or misshapen in `where`, in one message.
    """
    expected = {name: tuple(array.shape) for name, array in named(module).items()}
    found = {name: tuple(array.shape) for name, array in weights.items()}
    wrong = [f"{name} {expected[name]} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} {found[name]} is not expected" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config: {'; '.join(wrong)}")
