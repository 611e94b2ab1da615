"""Medusa's heads as they are published -> a drafter folder of ours.

| written by | tensors of head h with n blocks | output matrix |
|---|---|---|
| Medusa's first trainer, `medusa_lm_head.pt` | `{h}.{i}.linear.{weight,bias}` | `{h}.{n}.weight` |
| its second version, `medusa_lm_head.safetensors` | the same | the target's |
| Medusa-2, in the target's own checkpoint | the same, `medusa_head.` before them | `medusa_head.{h}.{n}.weight` |
| vLLM | `blocks.{h}.layers.{i}.weight`, `.bias` with `medusa_fc_bias` | `lm_heads.{h}.weight`, or the target's |

vLLM's heads may guess some of the target's tokens only: `token_map` names them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.config import shown
from redrafter_mlx.drafters.medusa import MODEL_TYPE, Medusa
from redrafter_mlx.target import Target

from .heads import (
    Checkpoint,
    HeadsSource,
    check_counts,
    count,
    made_for,
    notes_on_counts,
    read_checkpoint,
    read_config,
    refuse_unknown,
    shape_of,
)
from .source import Tensor, as_array

KIND = "Medusa heads"
PREFIX = r"(?:model\.)?medusa_heads?\."

_ENDS = ("weight", "bias")
_SHARES = "its heads have no output matrix of their own: the target's serves"


def is_medusa(path: Path) -> bool:
    """True where the config says so, or, where it says nothing, the file's name or the names of its tensors: those of
    several heads, since those of one look like a recurrent drafter without an RNN.
    """
    config = read_config(path)
    kind = config.get("model_type") or None
    if "medusa_num_heads" in config or kind in ("medusa", MODEL_TYPE):
        return True
    if kind is not None:
        return False
    found = read_checkpoint(path, PREFIX)
    if any(file.name.startswith("medusa_lm_head.") for file in found.files):
        return True
    names = found.tensors
    if any(re.fullmatch(r"blocks\.\d+\.layers\.\d+\.weight", name) for name in names):
        return True
    is_theirs = all(re.fullmatch(r"\d+\.\d+\.(linear\.weight|linear\.bias|weight)", name) for name in names)
    return is_theirs and count(names, r"(\d{1,9})\.\d+\.linear\.weight") > 1


def read_medusa(path: Path) -> HeadsSource:
    """Find the heads in a folder or file.

    Raises:
        FileNotFoundError, ValueError: no weights, or something in them that such heads do not have.
    """
    if read_config(path).get("model_type") == MODEL_TYPE:
        raise ValueError(f"{path} holds Medusa heads of redrafter-mlx already and loads as it is")
    found = read_checkpoint(path, PREFIX)
    notes = []
    if found.beside:
        notes.append(
            f"{found.beside} tensors beside the heads are left out; heads that were trained together with their target "
            "belong to that one only"
        )
    is_vllm = any(name.startswith("blocks.") for name in found.tensors)
    return (_vllm if is_vllm else _original)(found, notes)


def _original(found: Checkpoint, notes: list[str]) -> HeadsSource:
    tensors, where, config = found.tensors, found.where, found.config
    heads = count(tensors, r"(\d{1,9})\.\d{1,9}\.linear\.weight")
    layers = count(tensors, r"\d{1,9}\.(\d{1,9})\.linear\.weight")
    check_counts(heads, layers, where)
    each = [(h, i, end) for h in range(heads) for i in range(layers) for end in _ENDS]
    names = {f"heads.{h}.blocks.{i}.linear.{end}": f"{h}.{i}.linear.{end}" for h, i, end in each}
    values: dict[str, Any] = {"num_heads": heads, "num_layers": layers}
    values["hidden_size"] = shape_of(tensors, (f"{h}.0.linear.weight" for h in range(heads)), where)[1]
    if any(re.fullmatch(r"\d+\.\d+\.weight", name) for name in tensors):
        names |= {f"heads.{h}.output.weight": f"{h}.{layers}.weight" for h in range(heads)}
        values["vocab_size"] = shape_of(tensors, (f"{h}.{layers}.weight" for h in range(heads)), where)[0]
    else:
        values |= _shared(config)
        notes.append(_SHARES)
    refuse_unknown(tensors, names.values(), f"{heads} {KIND} of {layers} blocks", where)
    notes += notes_on_counts(config, (("medusa_num_heads", heads), ("medusa_num_layers", layers)))
    values |= made_for(config, values)
    return HeadsSource(where, found.container, KIND, Medusa, values, _finish, names, tensors, tuple(notes))


def _vllm(found: Checkpoint, notes: list[str]) -> HeadsSource:
    where, config = found.where, found.config
    if config.get("logit_scale", 1) != 1:
        raise ValueError(f"{where}: logit_scale {shown(config['logit_scale'])} is not supported, only 1")
    tensors = dict(found.tensors)
    heads = count(tensors, r"blocks\.(\d{1,9})\.layers\.\d{1,9}\.weight")
    layers = count(tensors, r"blocks\.\d{1,9}\.layers\.(\d{1,9})\.weight")
    check_counts(heads, layers, where)
    each = [(h, i, end) for h in range(heads) for i in range(layers) for end in _ENDS]
    names = {f"heads.{h}.blocks.{i}.linear.{end}": f"blocks.{h}.layers.{i}.{end}" for h, i, end in each}
    hidden = shape_of(tensors, (f"blocks.{h}.layers.0.weight" for h in range(heads)), where)[1]
    values: dict[str, Any] = {"num_heads": heads, "num_layers": layers, "hidden_size": hidden}
    if config.get("original_lm_head") or not any(name.startswith("lm_heads.") for name in tensors):
        values |= _shared(config)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
        notes.append(_SHARES)
    else:
        names |= {f"heads.{h}.output.weight": f"lm_heads.{h}.weight" for h in range(heads)}
        values["vocab_size"] = shape_of(tensors, (f"lm_heads.{h}.weight" for h in range(heads)), where)[0]
        if isinstance(config.get("vocab_size"), int):
            values["vocab_size"] = config["vocab_size"]
    if not any(name.endswith(".bias") for name in tensors):
        none = mx.zeros((hidden,), dtype=next(t.dtype for n, t in tensors.items() if n in names.values()))
        tensors |= {theirs: none for theirs in names.values() if theirs.endswith(".bias")}
    if "token_map" in tensors:
        tensors |= _reduced(tensors, where)
        if (size := tensors["token_map"].size) == values.get("vocab_size"):
            tensors.pop("token_map")
        else:
            values["draft_vocab_size"] = size
            names["d2t"] = "token_map"
    refuse_unknown(tensors, names.values(), f"{heads} {KIND} of {layers} blocks", where)
    notes += notes_on_counts(config, (("num_heads", heads), ("num_hidden_layers", layers)))
    values |= made_for(config, values)
    return HeadsSource(where, found.container, KIND, Medusa, values, _finish, names, tensors, tuple(notes))


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of heads that use the target's output matrix."""
    size = config.get("vocab_size")
    return {"output": "target"} | ({"vocab_size": size} if isinstance(size, int) else {})


def _reduced(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """`token_map` as the differences to the drafter's own ids, and the rows of its tokens where all are stored."""
    ids = as_array(tensors["token_map"])
    if ids.ndim != 1 or ids.size == 0 or not mx.issubdtype(ids.dtype, mx.integer):
        raise ValueError(f"{where}: token_map must be a list of token ids, not of shape {tuple(ids.shape)}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("lm_heads.") and len(tensor.shape) == 2 and tensor.shape[0] > ids.size:
            if not mx.all((ids >= 0) & (ids < tensor.shape[0])).item():
                raise ValueError(f"{where}: token_map names tokens that {name} has no row for")
            found[name] = as_array(tensor)[ids]
    found["token_map"] = ids.astype(mx.int32) - mx.arange(ids.size, dtype=mx.int32)
    return found


def _finish(values: dict[str, Any], target: Target | None) -> dict[str, Any]:
    if "vocab_size" in values:
        return values
    if target is None:
        raise ValueError(
            "the file does not say how many tokens there are, since its heads use the target's output matrix: "
            "--target is needed"
        )
    return {**values, "vocab_size": target.vocab_size}
