"""SwiGLU and attention through `mx.power(2, x)` (see `exponentials`), for the models of one target.

mlx-lm's models call `swiglu` and `scaled_dot_product_attention` by name. The methods that do are copied for the modules
of one target, and in the copies these names refer to the functions below. mlx-lm and its other models are unchanged.

Letters: N rows, T positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

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


_OURS: dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]] = {
    "swiglu": (_their_swiglu, swiglu),
    "scaled_dot_product_attention": (_their_attention, attention),
}


def replace_functions(model: nn.Module) -> None:
    """Replace `swiglu` and attention in the modules of `model`, by giving each a subclass of its class."""
    subclasses: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in subclasses:
            subclasses[kind] = _subclass(kind)
        if subclasses[kind] is not kind:
            module.__class__ = subclasses[kind]


def _subclass(kind: type) -> type:
    """A subclass of `kind` whose methods call the functions above instead of mlx-lm's; `kind` itself if none does."""
    rebound = {}
    for base_class in reversed(kind.__mro__):
        for name, method in vars(base_class).items():
            if isinstance(method, FunctionType):
                ours = _names_to_replace(method)
                if ours:
                    rebound[name] = _with_globals(method, ours)
                else:
                    rebound.pop(name, None)  # overridden by a method that calls neither
    return type(kind.__name__, (kind,), rebound) if rebound else kind


def _names_to_replace(method: FunctionType) -> dict[str, Any]:
    return {
        name: ours
        for name, (theirs, ours) in _OURS.items()
        if name in method.__code__.co_names and method.__globals__.get(name) is theirs
    }


def _with_globals(method: FunctionType, changed: dict[str, Any]) -> FunctionType:
    copy = FunctionType(
        method.__code__,
        {**method.__globals__, **changed},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy
