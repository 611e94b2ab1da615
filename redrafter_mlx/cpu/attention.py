"""SwiGLU and attention through `mx.power(2, x)` (see `exponentials`), for the models of one target.

mlx-lm's models call `swiglu` and `scaled_dot_product_attention` by name. The methods that do are copied for the modules
of one target, and in the copies these names refer to the functions below. mlx-lm and its other models are unchanged.

Letters: N rows, T positions, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from redrafter_mlx.rebinding import rebind

from .exponentials import LOG2_E

_NEVER = -1e30  # a score whose weight is 0
_FEW = 4000  # exponentials; for fewer, mlx-lm's single operation is faster

_their_swiglu = activations.swiglu
_their_attention = base.scaled_dot_product_attention


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x"""
    if gate.dtype != mx.float32 or gate.size < _FEW:
        return cast(mx.array, _their_swiglu(gate, x))
    return gate / (1 + mx.power(2.0, gate * -LOG2_E)) * x


def attention(  # noqa: PLR0913  (mlx-lm's signature)
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale queries keys^T) values: queries (B, heads, N, D); keys and values (B, key heads, T, D).

    Takes the place of mlx-lm's `scaled_dot_product_attention`, whose softmax makes verified rows expensive on a CPU.
    """
    batch, heads, rows, size = queries.shape
    groups, positions = keys.shape[1:3] if isinstance(keys, mx.array) else (0, 0)  # tuples are quantized
    is_bool = not isinstance(mask, mx.array) or mask.dtype == mx.bool_
    few = batch * heads * rows * positions < _FEW
    if few or queries.dtype != mx.float32 or sinks is not None or not is_bool:
        return cast(mx.array, _their_attention(queries, keys, values, cache, scale, mask, sinks))
    grouped = (queries * (scale * LOG2_E)).reshape(batch, groups, -1, size)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, groups, heads of a group x N, T)
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(positions - rows, positions)[:, None] >= mx.arange(positions)
    if mask is not None:
        by_head = scores.reshape(batch, heads, rows, positions)
        scores = mx.where(mask, by_head, _NEVER).reshape(scores.shape)
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    out = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(batch, heads, rows, -1)


def replace_functions(model: nn.Module) -> None:
    """Replace `swiglu` and attention in the modules of `model`, by giving each a subclass of its class."""
    rebind(
        model,
        {
            "swiglu": lambda theirs: swiglu if theirs is _their_swiglu else None,
            "scaled_dot_product_attention": lambda theirs: attention if theirs is _their_attention else None,
        },
    )
