"""exp and SiLU through `mx.power(2, x)`, which MLX's CPU backend vectorizes and `mx.exp` does not: two to three
times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx

LOG2_E = 1.4426950408889634


def exponential(x: mx.array) -> mx.array:
    """exp(x)."""
    return mx.power(2.0, x * LOG2_E)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x); its gradient is finite for every x."""
    return _silu(x)[0]


def _silu_and_sigmoid(x: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + mx.power(2.0, x * -LOG2_E))
    return x * sigmoid, sigmoid


def _vjp(primal: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    """The derivative of SiLU from its outputs, of which the sigmoid is finite even where the power overflowed."""
    value, sigmoid = outputs
    return cotangents[0] * (sigmoid + value * (1 - sigmoid))


_custom = mx.custom_function(_silu_and_sigmoid)
_custom.vjp(_vjp)
_silu = cast(Callable[[mx.array], tuple[mx.array, mx.array]], _custom)
