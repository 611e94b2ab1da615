"""RoPE as a GGUF has it: keys for its scaling, and tensors of a divisor per frequency."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .metadata import Metadata

FACTORS = "rope_freqs.weight"
"""Divisors of the frequencies, one for each; Llama 3.1 and later"""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The same for texts beyond and within the context that Phi-3 was first trained for"""

DIVIDED = {
    "type": "llama3", "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
"""Makes mlx-lm build a rope with a table of frequencies; `divide_frequencies` fills it."""


def check_full_rotation(meta: Metadata, head_dim: int) -> None:
    """Check that whole heads are rotated, as mlx-lm's model does.

    Raises:
        ValueError: only a part is.
    """
    rotated = meta.size("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{meta.path} rotates {rotated} of the {head_dim} values of a head; mlx-lm's model for "
            f"{meta.architecture} rotates all"
        )


def rope_settings(meta: Metadata, honored: frozenset[str]) -> dict[str, Any]:
    """`rope_scaling` of the config, where there is a scaling.

    Args:
        honored: the kinds that mlx-lm's model computes.

    Raises:
        ValueError: it is of another kind, or has settings that mlx-lm does not know.
    """
    scaling = _scaling(meta)
    if scaling is None:
        return {}
    kind = scaling["type"]
    if kind not in honored:
        known = ", ".join(sorted(honored)) or "no scaling"
        raise ValueError(
            f"{meta.path} has RoPE scaling {kind!r}; mlx-lm's model for {meta.architecture} computes {known}"
        )
    return {"rope_scaling": {**scaling, "rope_type": kind}}


def _scaling(meta: Metadata) -> dict[str, Any] | None:
    kind = meta.text("rope.scaling.type", "none")
    if LONG in meta.tensors or SHORT in meta.tensors:
        # their values are filled in when the tensors are read
        return {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}
    if FACTORS in meta.tensors:
        return dict(DIVIDED)
    if kind == "none" and meta.has("rope.scale_linear"):  # how older files say it
        factor = meta.positive("rope.scale_linear")
        return None if factor == 1 else {"type": "linear", "factor": factor}
    if kind == "none":
        return None
    if kind == "linear":
        return {"type": kind, "factor": meta.positive("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(meta)
    return {"type": kind}


def _yarn(meta: Metadata) -> dict[str, Any]:
    for key, plain in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        value = meta.number(f"rope.scaling.{key}", plain)
        if value != plain:
            raise ValueError(f"{meta.path}: rope.scaling.{key} {value} is not known; it must be {plain}")
    if meta.number("rope.scaling.yarn_log_multiplier", 0.0):
        raise ValueError(f"{meta.path}: rope.scaling.yarn_log_multiplier is not known; it must be 0")
    return {
        "type": "yarn",
        "factor": meta.positive("rope.scaling.factor"),
        "original_max_position_embeddings": meta.size(
            "rope.scaling.original_context_length", meta.size("context_length")
        ),
        "beta_fast": meta.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.positive("rope.scaling.yarn_beta_slow", 1.0),
    }


def add_factors(config: dict[str, Any], floats: dict[str, mx.array], meta: Metadata) -> None:
    """Put Phi-3's factors, which are tensors of the file, into the config.

    Raises:
        ValueError: one of the two is missing, or of the wrong length.
    """
    scaling = config.get("rope_scaling")
    if scaling is None or scaling["type"] != "longrope":
        return
    heads = config["hidden_size"] // config["num_attention_heads"]
    wanted = int(heads * config["partial_rotary_factor"]) // 2
    for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
        factors = floats.get(name)
        if factors is None or factors.shape != (wanted,):
            found = "missing" if factors is None else f"of shape {tuple(factors.shape)}"
            raise ValueError(f"{meta.path}: {name} must hold {wanted} factors, and is {found}")
        scaling[key] = factors.astype(mx.float32).tolist()


def divide_frequencies(model: nn.Module, factors: mx.array, config: dict[str, Any], meta: Metadata) -> None:
    """Divide the frequencies of every rope by the file's own factors.

    Raises:
        ValueError: there is not one for each.
    """
    dims = config["head_dim"]
    if factors.shape != (dims // 2,):
        raise ValueError(f"{meta.path}: {FACTORS} must hold {dims // 2} factors, not {tuple(factors.shape)}")
    frequencies = factors * config["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    for layer in model.layers:
        if hasattr(layer.self_attn.rope, "_freqs"):  # some layers rotate nothing
            layer.self_attn.rope._freqs = frequencies
