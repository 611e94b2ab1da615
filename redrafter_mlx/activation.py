"""exp, SiLU and SwiGLU, whose exponential MLX's CPU backend computes one value at a time: as a power of two it takes
a half to a third of the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from .device import on_gpu

_LOG2_E = 1.4426950408889634


def exponential(x: mx.array) -> mx.array:
    """exp(x)."""
    return mx.exp(x) if on_gpu() else mx.power(2.0, x * _LOG2_E)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return nn.silu(x) if on_gpu() else _silu(x)[0]


def _silu_and_sigmoid(x: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + mx.power(2.0, x * -_LOG2_E))
    return x * sigmoid, sigmoid


def _vjp(primal: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    """That of SiLU; the sigmoid is only returned for it. Finite where the power overflowed."""
    value, sigmoid = outputs
    return cotangents[0] * (sigmoid + value * (1 - sigmoid))


_custom = mx.custom_function(_silu_and_sigmoid)
_custom.vjp(_vjp)
_silu = cast(Callable[[mx.array], tuple[mx.array, mx.array]], _custom)

_their_swiglu = activations.swiglu  # one compiled operation, so on few values the better one
_WORTHWHILE = 4000  # values


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x"""
    if gate.dtype != mx.float32 or gate.size < _WORTHWHILE:
        return cast(mx.array, _their_swiglu(gate, x))
    return gate / (1 + mx.power(2.0, gate * -_LOG2_E)) * x


def replace_swiglu(model: nn.Module) -> None:
    """On a CPU, have the mlx-lm modules that `model` is written in take `swiglu` from here; they share it with
    every model of the same architecture in the process.
    """
    if on_gpu():
        return
    for name in {type(module).__module__ for module in model.modules()}:
        home = sys.modules[name]
        if getattr(home, "swiglu", None) is _their_swiglu:
            home.swiglu = swiglu  # type: ignore[attr-defined]
