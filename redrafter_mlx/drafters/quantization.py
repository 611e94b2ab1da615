"""Quantization of a drafter: the settings that its config may have, and how its layers are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from .config import shown

_FORMATS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Mode of `mx.quantize` -> its possible bits and group sizes."""


def _listed(values: Sequence[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def check_quantization(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Check a config's `quantization`, the arguments of `nn.quantize`, and return it.

    Raises:
        ValueError: a key is missing or unknown, or MLX does not support a value.
    """
    if values is None:
        return None
    if set(values) - {"bits", "group_size", "mode"} or not {"bits", "group_size"} <= set(values):
        raise ValueError(f"quantization must have bits and group_size (and mode), not {shown(values)}")
    mode = values.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _FORMATS:
        raise ValueError(f"quantization mode must be {_listed(list(_FORMATS))}, not {shown(mode)}")
    for name, allowed in zip(("bits", "group_size"), _FORMATS[mode], strict=True):
        value = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            raise ValueError(
                f"quantization {name} of mode {mode} must be {_listed(allowed)}, not {shown(value)}"
            )
    return values


def quantize(drafter: nn.Module, quantization: dict[str, Any]) -> None:
    """Quantize the linear layers in place (those whose input is a multiple of the group size)."""
    group_size = quantization["group_size"]

    def predicate(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % group_size == 0

    nn.quantize(drafter, **quantization, class_predicate=predicate)
