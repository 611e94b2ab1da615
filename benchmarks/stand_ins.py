"""What mlx-lm's own Metal kernels compute, for measuring families that need them on a machine without Metal."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.bitlinear_layers import BitLinear


def replace_kernels(module: ModuleType) -> None:
    """Have a module of mlx-lm call the functions here where it names Metal kernels (Muse Spark); nothing on Metal."""
    if mx.metal.is_available():
        return
    for function in (
        expert_routing, norm_add_norm, post_expert_norm_combine, pre_norm, qk_norm, qk_norm_rope,
        rms_norm_sigmoid_gate,
    ):  # fmt: skip
        if hasattr(module, function.__name__) and "kernels" in getattr(module, function.__name__).__module__:
            setattr(module, function.__name__, function)


def replace_layers(model: nn.Module) -> None:
    """Put plain linear layers where a model has ternary ones (BitNet), which are Metal kernels."""
    if mx.metal.is_available():
        return
    for module in model.modules():
        for name, child in module.children().items():
            if isinstance(child, BitLinear):
                module[name] = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    """Experts with the best biased scores, and their scores as weights."""
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    picked = mx.take_along_axis(scores, chosen, axis=-1)
    return [chosen, picked / (picked.sum(axis=-1, keepdims=True) + score_eps) * route_scale]


def norm_add_norm(  # noqa: PLR0913  (mlx-lm's signature)
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: nn.RMSNorm | None,
) -> tuple[mx.array, mx.array | None]:
    """alpha * stream + beta * norm(branch), and the norm of that."""
    scaled = branch if post_weight is None else branch * post_weight
    total = alpha * stream + beta * mx.fast.rms_norm(scaled.astype(mx.float32), None, post_eps)
    return total, None if next_norm is None else pre_norm(total, next_norm, dtype=branch.dtype)


def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
    return mx.fast.rms_norm(stream, norm.weight.astype(mx.float32), norm.eps).astype(dtype)


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def qk_norm(  # noqa: PLR0913  (mlx-lm's signature)
    qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
) -> list[mx.array]:
    """(..., C) -> normalized queries (..., heads, D), scaled, and keys."""
    split = [n_heads * head_dim, (n_heads + n_kv_heads) * head_dim]
    queries, keys, _ = mx.split(qkvg, split, axis=-1)
    queries = queries.reshape(*qkvg.shape[:-1], n_heads, head_dim)
    keys = keys.reshape(*qkvg.shape[:-1], n_kv_heads, head_dim)
    return [mx.fast.rms_norm(queries, None, eps) * query_scale, mx.fast.rms_norm(keys, None, eps)]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **sizes: float
) -> list[mx.array]:
    """`qk_norm`, rotated; `offset` is a position, or one for every entry of the batch."""
    made = qk_norm(qkvg, **sizes)  # type: ignore[arg-type]
    return [
        mx.fast.rope(
            each.swapaxes(1, 2), each.shape[-1], traditional=True, base=rope_base, scale=1.0, offset=offset
        ).swapaxes(1, 2)
        for each in made
    ]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """x (B, H, N, D) normalized and gated, (B, N, H * D)."""
    rows = mx.fast.rms_norm(x, None, eps).swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1) * mx.sigmoid(gate)
