"""A GGUF's tensors and metadata as a model of mlx-lm, with its tokenizer.

What MLX has a type for stays as it is; the rest is packed anew, once. What is left to do: rename the tensors, and undo
what llama.cpp's converter does to some of them.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.device import memory_bytes, on_gpu
from redrafter_mlx.files import cast_floating, check_weights
from redrafter_mlx.loading.memory import check_fits

from .families import Family, config_of, family_of
from .metadata import Metadata
from .probe import agreement
from .reader import GGUFHeader, read_header
from .repacked import foreign, is_packed, repacked
from .rope import FACTORS, LONG, SHORT, add_factors, divide_frequencies
from .tensors import FLOATS, GROUP_SIZE, NATIVE, Packed, read_exact, read_float, read_packed
from .tokenizer import load_tokenizer

_log = logging.getLogger("redrafter_mlx")

Tensor = mx.array | Packed


def load_gguf(path: str | Path) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Build (model, tokenizer, config) from a GGUF file; packed weights stay packed.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that cannot be loaded whole.
    """
    path = Path(path)
    header = read_header(path)
    meta = Metadata(header, path)
    family = family_of(meta)
    config = config_of(meta, family)
    _check_names(header, family, meta)
    if not on_gpu():
        check_fits(path, 4.0 * sum(math.prod(shape) for shape, _ in header.tensors.values()))
    tokenizer = load_tokenizer(header.metadata, path)
    is_new = not is_packed(header)
    tensors = _read(header, path)
    floats = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, mx.array)}
    add_factors(config, floats, meta)
    model = _loaded(tensors, family, config, meta)
    if is_new:
        _compare(model, header, tensors, tokenizer, lambda exact: _loaded(exact, family, config, meta))
    return model, tokenizer, config


def _loaded(tensors: dict[str, Tensor], family: Family, config: dict[str, Any], meta: Metadata) -> nn.Module:
    """The model with its weights.

    Raises:
        ValueError: they do not fit the config.
    """
    model, weights = _build(tensors, family, config, meta)
    check_weights(model, weights, str(meta.path))
    model.load_weights(list(weights.items()))
    factors = tensors.get(FACTORS)
    if isinstance(factors, mx.array):
        divide_frequencies(model, factors, config, meta)
    model.eval()
    return model


def _compare(
    model: nn.Module,
    header: GGUFHeader,
    tensors: dict[str, Tensor],
    tokenizer: TokenizerWrapper,
    load: Callable[[dict[str, Tensor]], nn.Module],
) -> None:
    """Log how often the model says what it would say with the file's own values, where both fit into memory."""
    bytes_needed = 4.0 * sum(math.prod(header.tensors[name][0]) for name in foreign(header))
    if bytes_needed > memory_bytes() / 4:
        _log.warning(
            "what that does to the text was not compared: the unpacked tensors take %.1f GB",
            bytes_needed / 1e9,
        )
        return
    exact = {
        name: read_exact(header.places[name], header.tensors[name][0], kind)
        for name, kind in foreign(header).items()
    }
    same, count = agreement(model, load({**tensors, **exact}), tokenizer)
    _log.warning("%d of %d greedy tokens of a probe text are those of the unpacked tensors", same, count)


def _read(header: GGUFHeader, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(repacked(header, path))
    for name, (shape, kind) in header.tensors.items():
        if kind in FLOATS:
            tensors[name] = read_float(header.places[name], shape, kind)
        elif kind in NATIVE:
            tensors[name] = read_packed(header.places[name], shape, kind)
    return tensors


def _build(
    tensors: dict[str, Tensor], family: Family, config: dict[str, Any], meta: Metadata
) -> tuple[nn.Module, dict[str, mx.array]]:
    """The model, with layers of the kinds that the tensors are packed in, and the weights under its names.

    Raises:
        ValueError: mlx-lm's model cannot be built from the config.
    """
    module = importlib.import_module(f"mlx_lm.models.{family.model_type}")
    try:
        model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    except (ValueError, TypeError, KeyError, ZeroDivisionError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{meta.path} does not make a model of mlx-lm's {family.model_type}: {error}"
        ) from None
    layers = {name for name, layer in model.named_modules() if hasattr(layer, "to_quantized")}
    formats: dict[str, dict[str, Any]] = {}
    weights: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        ours = _name(name, family)
        if ours is None:
            continue
        changed = _changed(name, tensor, family, config)
        owner, _, part = ours.rpartition(".")
        if isinstance(changed, Packed) and owner in layers and part == "weight":
            formats[owner] = {"bits": changed.bits, "group_size": GROUP_SIZE, "mode": changed.mode}
            weights |= {f"{owner}.{each}": array for each, array in changed.parts.items()}
            continue
        dense = changed.dense() if isinstance(changed, Packed) else changed
        weights[ours] = dense
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if family.overflows and on_gpu():
        weights = {name: cast_floating(array, mx.bfloat16) for name, array in weights.items()}
    nn.quantize(model, group_size=GROUP_SIZE, class_predicate=_predicate(formats))
    return model, weights


def _predicate(formats: dict[str, dict[str, Any]]) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    return lambda name, _: formats.get(name, False)


_UNUSED = (FACTORS, LONG, SHORT)  # settings, and no weights


def _check_names(header: GGUFHeader, family: Family, meta: Metadata) -> None:
    """Check that all tensors are known, before any is read.

    Raises:
        ValueError: some are not, all by name.
    """
    unknown = sorted(name for name in header.tensors if name not in _UNUSED and _known(name, family) is None)
    if unknown:
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        raise ValueError(
            f"{meta.path} holds tensors that mlx-lm's {family.model_type} does not have: "
            f"{', '.join(unknown[:20])}{more}"
        )


def _known(name: str, family: Family) -> str | None:
    """What mlx-lm calls a tensor, "" for one that is not needed; None for an unknown one."""
    stem, _, part = name.rpartition(".")
    parts = stem.split(".")
    in_layer = len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal()
    if in_layer and parts[2] == "attn_rot_embd":
        return ""
    ours = family.names.get(parts[-1])
    if ours is None or part not in ("weight", "bias") or (not in_layer and len(parts) != 1):
        return None
    if in_layer == ours.startswith(("model.", "lm_head")):
        return None
    prefix = f"model.layers.{parts[1]}." if in_layer else ""
    bare = ours.endswith(".sinks")  # an array of a module, not the weight of one
    return f"{prefix}{ours}" if bare else f"{prefix}{ours}.{part}"


def _name(name: str, family: Family) -> str | None:
    return None if name in _UNUSED else _known(name, family) or None


def _changed(name: str, tensor: Tensor, family: Family, config: dict[str, Any]) -> Tensor:
    """A tensor as mlx-lm's model has it: what the converter did to it undone."""
    stem, _, part = name.rpartition(".")
    short = stem.split(".")[-1]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if family.permuted and short in heads:
        return _each(tensor, lambda rows: _unpermute(rows, heads[short]))
    if short.endswith("norm") and family.norm_offset and part == "weight":
        dense = tensor.dense() if isinstance(tensor, Packed) else tensor
        return dense.astype(mx.float32) - family.norm_offset
    if short == "ffn_gate_inp_shexp":  # a row, which the converter may have made a vector
        return _each(tensor, lambda rows: rows.reshape(1, -1))
    return tensor


def _each(tensor: Tensor, change: Callable[[mx.array], mx.array]) -> Tensor:
    """Change the rows of a tensor; packed ones lie alike in all their parts."""
    if isinstance(tensor, mx.array):
        return change(tensor)
    biases = None if tensor.biases is None else change(tensor.biases)
    return replace(tensor, weight=change(tensor.weight), scales=change(tensor.scales), biases=biases)


def _unpermute(rows: mx.array, num_heads: int) -> mx.array:
    """Put q/k rows back from llama.cpp's interleaved order to halves; biases, which have one dimension, likewise."""
    if rows.shape[0] % (2 * num_heads):
        return rows  # of another shape than the config's, which is refused by it
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
