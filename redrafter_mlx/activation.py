"""What takes exponentials (exp, SiLU, SwiGLU, attention), faster on a CPU: MLX's backend there computes them one value
at a time; as powers of two they take a half to a third of the time.

Letters: N rows, T positions, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from .device import on_gpu

_LOG2_E = 1.4426950408889634
_NEVER = -1e30  # a score that weighs nothing


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
_their_attention = base.scaled_dot_product_attention
_WORTHWHILE = 4000  # exponentials


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x"""
    if gate.dtype != mx.float32 or gate.size < _WORTHWHILE:
        return cast(mx.array, _their_swiglu(gate, x))
    return gate / (1 + mx.power(2.0, gate * -_LOG2_E)) * x


def attention(  # noqa: PLR0913  (mlx-lm's signature)
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale queries keys^T) values. (B, heads, N, D), keys and values (B, their heads, T, D).

    Takes the place of mlx-lm's `scaled_dot_product_attention`, whose softmax makes verified rows dear on a CPU.
    """
    batch, heads, rows, size = queries.shape
    groups, positions = keys.shape[1:3] if isinstance(keys, mx.array) else (0, 0)  # tuples are quantised
    is_bool = not isinstance(mask, mx.array) or mask.dtype == mx.bool_
    few = batch * heads * rows * positions < _WORTHWHILE
    if few or queries.dtype != mx.float32 or sinks is not None or not is_bool:
        return cast(mx.array, _their_attention(queries, keys, values, cache, scale, mask, sinks))
    grouped = (queries * (scale * _LOG2_E)).reshape(batch, groups, -1, size)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, groups, heads of a group x N, T)
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(positions - rows, positions)[:, None] >= mx.arange(positions)
    if mask is not None:
        by_head = scores.reshape(batch, heads, rows, positions)
        scores = mx.where(mask, by_head, _NEVER).reshape(scores.shape)
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    out = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(batch, heads, rows, -1)


def replace_exponentials(model: nn.Module) -> None:
    """On a CPU, have the mlx-lm modules that `model` is written in take `swiglu` and attention from here; they share
    them with every model of the same architecture in the process.
    """
    if on_gpu():
        return
    ours = {"swiglu": (_their_swiglu, swiglu), "scaled_dot_product_attention": (_their_attention, attention)}
    for home in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name, (theirs, own) in ours.items():
            if getattr(home, name, None) is theirs:
                setattr(home, name, own)
