"""Hidden states out of unmodified mlx-lm models, and what a model does with its embedding.

A module whose output is wanted gets a subclass of its class that notes it; weights and code stay.

Letters: H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

FINAL = -1
"""Key of the final-norm hidden state; layers have their index from 0."""

PROBE_TOKENS = (1, 2, 3, 5, 8, 13)
"""Several, because a row of an embedding may be zero (padding)."""


def note_output(module: nn.Module, notes: dict[int, mx.array], key: int) -> None:
    """Make `module` write its output to `notes[key]`."""
    original = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original.__call__(self, *args, **kwargs)
        notes[key] = out[0] if isinstance(out, tuple) else out
        return out

    module.__class__ = type(original.__name__, (original,), {"__call__": call})


def inner_model(model: nn.Module) -> nn.Module:
    """The module whose output is the final-norm hidden state.

    Raises:
        ValueError: there is none where mlx-lm's models have it.
    """
    for path in (("model",), ("language_model", "model"), ("transformer",), ("language_model",)):
        module: Any = model
        for name in path:
            module = module.get(name) if isinstance(module, nn.Module) else None
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"{type(model).__module__} has no inner model whose hidden states could be read")


def input_embedding(inner: nn.Module) -> nn.Module:
    """The module that turns tokens into vectors.

    Raises:
        ValueError: there is none where mlx-lm's models have it.
    """
    for name in ("embed_tokens", "wte", "word_embeddings", "embeddings", "embedding"):
        if isinstance(inner.get(name), nn.Module):
            return inner[name]
    raise ValueError(f"{type(inner).__module__} has no input embedding that could be found")


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head; None where it is the input embedding (tied)."""
    for owner in (model, model.get("language_model")):
        for name in ("lm_head", "output"):
            if isinstance(owner, nn.Module) and isinstance(owner.get(name), nn.Module):
                return owner[name]
    return None


def probe(
    model: nn.Module, first_layer: nn.Module, embedding: nn.Module, tokens: Sequence[int] = PROBE_TOKENS
) -> tuple[float, mx.array]:
    """Run some tokens to learn what the model multiplies its embedding by; returns that and the logits (1, n, V).

    Raises:
        ValueError: the factor is no finite number: every probed row of the embedding is zero, or not finite.
    """
    seen: list[mx.array] = []
    original = type(first_layer)

    def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.append(x)
        return original.__call__(module, x, *args, **kwargs)

    limit = embedding.weight.shape[0]
    ids = mx.array([token % limit for token in tokens])
    first_layer.__class__ = type(original.__name__, (original,), {"__call__": call})
    try:
        logits = model(ids[None], cache=None)
    finally:
        first_layer.__class__ = original
    vectors = embedding(ids).astype(mx.float32)
    scaled = seen[0].reshape(vectors.shape).astype(mx.float32)
    scale = ((vectors * scaled).sum() / (vectors * vectors).sum()).item()
    if not abs(scale) < float("inf"):
        raise ValueError(
            f"the embedding's rows {list(tokens)} are zero or not finite (scale {scale}): damaged weights?"
        )
    return round(scale, 6), logits
