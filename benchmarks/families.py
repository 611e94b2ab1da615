"""A tiny model with random weights for every module of `mlx_lm.models`; its sizes are in `family_sizes`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten

from . import stand_ins
from .family_sizes import FAMILIES, SIZES, VOCAB

SEQUENCE = VOCAB - 10  # tokens below are those of texts
GAIN = 1.6  # of a matrix: choices are clear ones


def names() -> list[str]:
    """Modules of `mlx_lm.models` that hold a model: those with a `Model` class, by their source."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{module.name}")
        assert spec is not None and spec.loader is not None
        source = spec.loader.get_source(spec.name)  # type: ignore[attr-defined]
        if "\nclass Model(" in source or "import Model " in source:
            found.append(module.name)
    return found


def config_of(family: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a tiny model with `changes`, as a folder's config.json would have it."""
    own = dict(FAMILIES.get(family, {}))
    text = {"model_type": family, **own.pop("text_config", {})}
    values = {**SIZES, **own, **(changes or {})}
    return {**values, "model_type": family, "text_config": {**values, **text}}


def build(family: str, seed: int = 0, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """A tiny model with random weights, so large that its choices are clear ones.

    Raises:
        ImportError: the module needs a package that is not installed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module = importlib.import_module(f"mlx_lm.models.{family}")
    except SystemExit:
        raise ImportError(f"mlx_lm.models.{family} cannot be imported: {said.getvalue().strip()}") from None
    stand_ins.replace_kernels(module)
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config_of(family, changes)))
    stand_ins.replace_layers(model)
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    model.update(tree_unflatten([(name, _filled(name, array)) for name, array in parameters]))
    model.eval()
    mx.eval(model.parameters())
    return model


def _filled(name: str, array: mx.array) -> mx.array:
    """Weights of a parameter: matrices that keep the size of what they multiply, and nothing that is zero."""
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape).astype(mx.uint32)
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if name.endswith("scales"):
        return (mx.random.uniform(0.5, 1.5, array.shape) * 0.05).astype(array.dtype)
    if name.endswith("weight") and array.ndim >= 2:
        is_embedding = array.shape[0] == VOCAB and "head" not in name
        inputs = math.prod(array.shape[1:]) if array.ndim < 4 else array.shape[-1]
        scale = 1.0 if is_embedding else GAIN / math.sqrt(inputs)
        return (mx.random.normal(array.shape) * scale).astype(array.dtype)
    if not mx.any(array).item():
        return (mx.random.normal(array.shape) * 0.1).astype(array.dtype)
    return array
