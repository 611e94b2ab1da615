"""Hydra's heads as they are published -> a drafter folder of ours.

| `hydra_head_arch` | block i of head h | output of head h |
|---|---|---|
| `mlp` | `hydra_mlp.{h}.{i}` | `hydra_lm_head.{h}` |
| `prefix-mlp` (Hydra++) | `hydra_mlp.{h}.{2 i + 1}`: every other layer is a dropout | `hydra_lm_head.{h}.1` |

A block is `.linear.{weight,bias}`; the first one of grounded heads also has `.res_connection.{weight,bias}`. Hydra++'s
layer is `prefix_embeding_layer.` (as its authors spell it) and a Llama model of one layer after that; its embedding and
`rotary_emb.inv_freq` are not read. The layer takes its number of heads and its rotations from the config of the model
that it was trained for, so that model must be named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.config import shown
from redrafter_mlx.drafters.hydra import MODEL_TYPE, Hydra
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

KIND = "Hydra heads"
PREFIX = r"hydra_head\."
ARCHITECTURES = ("mlp", "prefix-mlp")

_LAYER = "prefix_embeding_layer."
_FREQUENCIES = f"{_LAYER}layers.0.self_attn.rotary_emb.inv_freq"
_UNREAD = (_FREQUENCIES, f"{_LAYER}embed_tokens.weight")
_ENDS = ("weight", "bias")

_PREFIX_NAMES = {
    **{f"prefix.{name}.weight": f"{_LAYER}layers.0.self_attn.{name}.weight"
       for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"prefix.{name}.weight": f"{_LAYER}layers.0.mlp.{name}.weight"
       for name in ("gate_proj", "up_proj", "down_proj")},
    **{f"prefix.{name}.weight": f"{_LAYER}layers.0.{name}.weight"
       for name in ("input_layernorm", "post_attention_layernorm")},
    "prefix.norm.weight": f"{_LAYER}norm.weight",
}  # fmt: skip


def is_hydra(path: Path) -> bool:
    """True where the config says so, or, without a config, the tensors' names."""
    config = read_config(path)
    if config:
        return "hydra_num_heads" in config or config.get("model_type") == MODEL_TYPE
    return any(name.startswith("hydra_mlp.") for name in read_checkpoint(path, PREFIX).tensors)


def read_hydra(path: Path) -> HeadsSource:
    """Find the heads in a folder or file.

    Raises:
        FileNotFoundError, ValueError: no config, no weights, or something in them that is not supported here.
    """
    config = read_config(path)
    if config.get("model_type") == MODEL_TYPE:
        raise ValueError(f"{path} holds Hydra heads of redrafter-mlx already and loads as it is")
    folder = path if path.is_dir() else path.parent
    if not config:
        raise FileNotFoundError(
            f"no file {folder / 'config.json'}: without it nobody knows which hidden state Hydra's heads read"
        )
    _check_config(config, str(folder / "config.json"))
    return _read(read_checkpoint(path, PREFIX))


def _check_config(config: dict[str, Any], where: str) -> None:
    architecture = config.get("hydra_head_arch", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{where}: hydra_head_arch {shown(architecture)} is not supported, only {' and '.join(ARCHITECTURES)}"
        )
    if config.get("hidden_state_offset", 0) != 0:
        raise ValueError(
            f"{where}: hidden_state_offset {shown(config['hidden_state_offset'])} is not supported, only 0, the last "
            "hidden state"
        )


def _read(found: Checkpoint) -> HeadsSource:
    where, config = found.where, found.config
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in _UNREAD}
    has_prefix = any(name.startswith(_LAYER) for name in tensors)
    stated = config.get("hydra_head_arch", ARCHITECTURES[0])
    if (stated == "prefix-mlp") != has_prefix:
        raise ValueError(
            f"{where} {'holds a' if has_prefix else 'lacks the'} prefix layer, {_LAYER}*, and hydra_head_arch in its "
            f"config is {stated}"
        )
    step, first, tail = (2, 1, ".1") if has_prefix else (1, 0, "")
    heads = count(tensors, r"hydra_mlp\.(\d{1,9})\.\d{1,9}\.linear\.weight")
    layers = -(-(count(tensors, r"hydra_mlp\.\d{1,9}\.(\d{1,9})\.linear\.weight") - first) // step)
    check_counts(heads, layers, where)
    is_grounded = any(".res_connection." in name for name in tensors)
    names = {}
    for h in range(heads):
        for end in _ENDS:
            for i in range(layers):
                names[f"heads.{h}.blocks.{i}.linear.{end}"] = f"hydra_mlp.{h}.{first + step * i}.linear.{end}"
            if is_grounded:
                names[f"heads.{h}.blocks.0.residual.{end}"] = f"hydra_mlp.{h}.{first}.res_connection.{end}"
            names[f"heads.{h}.output.{end}"] = f"hydra_lm_head.{h}{tail}.{end}"
    names |= _PREFIX_NAMES if has_prefix else {}
    refuse_unknown(tensors, names.values(), f"{heads} {KIND} of {layers} layers", where)
    rows, hidden = shape_of(tensors, (f"hydra_lm_head.{h}{tail}.weight" for h in range(heads)), where)
    values: dict[str, Any] = {
        "num_heads": heads,
        "num_layers": layers,
        "hidden_size": hidden,
        "vocab_size": rows,
    }
    values |= {"grounded": is_grounded, **made_for(config, values)}
    counts: list[tuple[str, Any]] = [("hydra_num_heads", heads), ("hydra_num_layers", layers)]
    notes = notes_on_counts(config, [*counts, ("grounded_heads", is_grounded)])
    if has_prefix:
        values["prefix"] = _prefix_sizes(found.tensors, where)
    kind = "Hydra++ heads" if has_prefix else KIND
    return HeadsSource(where, found.container, kind, Hydra, values, _finish, names, tensors, tuple(notes))


def _prefix_sizes(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """What the tensors say of the prefix layer: rows of its projections, and the base of its rotations if stored."""
    matrices = {"queries": "q_proj", "keys": "k_proj", "intermediate_size": "gate_proj"}
    names = {key: _PREFIX_NAMES[f"prefix.{name}.weight"] for key, name in matrices.items()}
    if any(name not in tensors for name in names.values()):
        missing = [name for name in _PREFIX_NAMES.values() if name not in tensors]
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    sizes: dict[str, Any] = {key: shape_of(tensors, [name], where)[0] for key, name in names.items()}
    if _FREQUENCIES in tensors:
        frequencies = np.array(as_array(tensors[_FREQUENCIES]).astype(mx.float32), dtype=np.float64)
        last = frequencies.size - 1
        if frequencies.ndim != 1 or last < 1 or not 0 < frequencies[last] < 1:
            raise ValueError(f"{where}: {_FREQUENCIES} holds no frequencies of rotations")
        sizes["base"] = float(
            frequencies[last] ** (-(last + 1) / last)
        )  # base ^ (-2 last / D), D = 2 (last + 1)
    return sizes


def _finish(values: dict[str, Any], target: Target | None) -> dict[str, Any]:
    """The config, its prefix layer completed from the target's."""
    if "prefix" not in values:
        return values
    if target is None:
        raise ValueError(
            "the file does not say how many heads its prefix layer has and how it rotates by position: as the model "
            "that it drafts for, so --target is needed"
        )
    args = getattr(target.model, "args", None)
    if type(target.model).__module__ != "mlx_lm.models.llama" or args is None:
        raise ValueError(
            f"its prefix layer is one of a Llama like the model that it drafts for, and {target.name} is a "
            f"{type(target.model).__module__.rpartition('.')[2]}"
        )
    sizes = dict(values["prefix"])
    queries, keys, base = sizes.pop("queries"), sizes.pop("keys"), sizes.pop("base", args.rope_theta)
    size = queries // args.num_attention_heads
    if size * args.num_attention_heads != queries or size == 0 or keys % size or keys == 0:
        raise ValueError(
            f"its prefix layer has {queries} queries and {keys} keys, which cannot be those of the "
            f"{args.num_attention_heads} heads that {target.name} has"
        )
    # 16-bit frequencies give the base to a part in a thousand
    exact = next((each for each in (args.rope_theta, 10000.0) if abs(base - each) < 0.01 * each), base)
    sizes |= {
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": keys // size,
        "head_dim": size,
    }
    sizes |= {
        "rms_norm_eps": args.rms_norm_eps,
        "rope_theta": float(exact),
        "rope_scaling": args.rope_scaling,
    }
    sizes["max_position_embeddings"] = args.max_position_embeddings
    return {**values, "prefix": {key: value for key, value in sizes.items() if value is not None}}
