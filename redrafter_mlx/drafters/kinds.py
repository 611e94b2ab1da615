"""Drafter folders of every kind: `config.json`, whose `model_type` names the kind, and `model.safetensors`."""

from __future__ import annotations

import importlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.files import (
    cast_floating,
    check_weights,
    named_weights,
    new_folder,
    read_json,
    read_safetensors,
    write_safetensors,
)

from .config import shown
from .interface import Drafter
from .quantization import quantize
from .recurrent import MODEL_TYPE, RecurrentDrafter

WEIGHTS = "model.safetensors"

KINDS = {
    MODEL_TYPE: "recurrent:RecurrentDrafter",
    "mlp_speculator": "speculator:Speculator",
    "medusa_heads": "medusa:Medusa",
    "hydra_heads": "hydra:Hydra",
}
"""`model_type` of a config -> module and class, an `nn.Module` that is a `Drafter` and has a `Config`."""

PUBLISHED = {"medusa_num_heads": "Medusa's", "hydra_num_heads": "Hydra's"}
"""Key of a config that has not been converted -> whose it is. A speculator's has our `model_type`: see there."""


def load_drafter(path: str | Path, dtype: mx.Dtype | None = None) -> Drafter:
    """Load a drafter folder of any kind, Apple's own included.

    Args:
        dtype: cast floating weights to this; None keeps what the file has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: all missing, superfluous and misshapen tensors in one message; weights that are not finite; a
            reduced vocabulary with tokens that the target does not have.
    """
    folder = Path(path)
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    for key, whose in PUBLISHED.items():
        if key in values:
            raise ValueError(
                f"{where} is {whose} as it was published: `redrafter-convert drafter` makes a folder that loads"
            )
    kind = values.get("model_type", MODEL_TYPE)
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"{where} is not a drafter: model_type is {shown(kind)}, known are {known}")
    module, _, name = KINDS[kind].partition(":")
    made: Any = getattr(importlib.import_module(f".{module}", __package__), name)
    config, unknown = made.Config.from_dict(values, where)
    if unknown:
        warnings.warn(f"{where}: keys not known here: {', '.join(unknown)}", stacklevel=2)
    weights = read_safetensors(folder / WEIGHTS)
    weights.pop("emb_norm.weight", None)  # Apple's MLX port stores it and never applies it
    drafter = build_drafter(made, config, weights, str(folder / WEIGHTS))
    weights = {name: cast_floating(array, dtype) for name, array in weights.items()}
    if "d2t" in weights:
        weights["d2t"] = weights["d2t"].astype(mx.int32)
    drafter.load_weights(list(weights.items()))
    drafter.eval()
    return cast(Drafter, drafter)


def load_recurrent(path: str | Path, dtype: mx.Dtype | None = None) -> RecurrentDrafter:
    """`load_drafter` for training and export, which need a recurrent drafter.

    Raises:
        FileNotFoundError, ValueError: as `load_drafter`; also for a drafter of another kind.
    """
    drafter = load_drafter(path, dtype)
    if not isinstance(drafter, RecurrentDrafter):
        raise ValueError(f"{path} is a {drafter.config.model_type}, and this takes a {MODEL_TYPE}")
    return drafter


def build_drafter(made: Any, config: Any, weights: dict[str, mx.array], where: str) -> nn.Module:
    """Build the module for a config and compare its tensors with the file's before any memory is taken for them.

    Raises:
        ValueError: see `load_drafter`.
    """
    blocks = getattr(config, "num_draft_layers", 0)
    if blocks > len(weights):  # do not build a million blocks to say that they are missing
        raise ValueError(
            f"{where} does not fit its config: num_draft_layers is {blocks}, and it holds {len(weights)} tensors"
        )
    drafter: nn.Module = made(config)
    if config.quantization:
        quantize(drafter, config.quantization)
    check_weights(drafter, weights, where)
    check_values(drafter, weights, config, where)
    return drafter


def check_values(drafter: nn.Module, weights: dict[str, mx.array], config: Any, where: str) -> None:
    """Check what shapes do not show: dtypes, that weights are finite, that the target has the reduced vocabulary.

    Raises:
        ValueError: names the first tensor that is wrong.
    """
    expected = named_weights(drafter)
    for name, array in weights.items():
        is_float = mx.issubdtype(array.dtype, mx.floating)
        if name != "d2t" and is_float != mx.issubdtype(expected[name].dtype, mx.floating):
            raise ValueError(
                f"{where}: {name} cannot be of dtype {str(array.dtype).removeprefix('mlx.core.')}"
            )
        if is_float and not mx.all(mx.isfinite(array)).item():
            raise ValueError(f"{where}: {name} holds values that are not finite")
    if "d2t" in weights:
        _check_vocabulary(weights["d2t"], config.vocab_size, where)


def _check_vocabulary(d2t: mx.array, vocab_size: int, where: str) -> None:
    if not mx.issubdtype(d2t.dtype, mx.integer):
        raise ValueError(f"{where}: d2t must hold integers, not {str(d2t.dtype).removeprefix('mlx.core.')}")
    ids = [index + int(step) for index, step in enumerate(cast(list[int], d2t.tolist()))]
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: d2t[{index}] names the token {token}, and the target's are 0..{vocab_size - 1}"
            )
    if len(set(ids)) < len(ids):
        raise ValueError(f"{where}: d2t names the token {Counter(ids).most_common(1)[0][0]} twice")


def save_drafter(drafter: Drafter, path: str | Path, extra: Sequence[tuple[str, str]] = ()) -> None:
    """Write a drafter folder; it appears whole or not at all. `extra`: further text files (name, content)."""
    with new_folder(Path(path)) as folder:
        text = json.dumps(drafter.config.to_dict(), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")
        write_safetensors(folder / WEIGHTS, named_weights(cast(nn.Module, drafter)), {"format": "mlx"})
        for name, content in extra:
            (folder / name).write_text(content)
