"""Drafters: other people's checkpoints as folders of ours.

Of a recurrent drafter the sizes come from the tensors: configs of other tools lack the vocabulary or count
the residual blocks wrongly. Drafters of other kinds are read by `published`.

Letters: H hidden size, X exit_dim, V vocabulary, N residual blocks (num_draft_layers).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.kinds import KINDS, load_drafter, save_drafter
from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig, RecurrentDrafter, changed
from redrafter_mlx.drafters.speculator import SpeculatorConfig
from redrafter_mlx.files import cast_floating, check_finite, check_weights, named_weights, read_json
from redrafter_mlx.loading.load import load
from redrafter_mlx.target import Target

from .names import SETTINGS, Named, translate
from .published import Source, read_published
from .source import (
    Report,
    Tensor,
    as_array,
    check_output,
    dtype_name,
    dtype_of,
    locate,
    output_folder,
    read_weights,
)
from .speculator import is_ours


@dataclass(frozen=True, slots=True)
class DrafterSource:
    """A drafter found in somebody's checkpoint, not read yet."""

    where: str
    container: str
    named: Named
    config: DrafterConfig
    tensors: dict[str, Tensor]
    """our name -> tensor"""
    notes: tuple[str, ...]
    """what the user should know about it"""


def read_drafter(path: Path) -> DrafterSource:
    """Find the drafter in a folder or file and check every name and shape.

    Raises:
        FileNotFoundError, ValueError: no weights, no drafter among them, or one whose parts do not
            fit together.
    """
    weights = read_weights(path)
    where = ", ".join(str(file) for file in weights.files)
    settings = _settings(weights.folder / "config.json")
    named = translate(sorted(weights.tensors))
    if named.unknown:
        listed = ", ".join(named.unknown[:6]) + (", ..." if len(named.unknown) > 6 else "")
        raise ValueError(
            f"{where} is not a recurrent drafter in a dialect known here: {len(named.unknown)} of "
            f"its tensors have names that no drafter has ({listed}). Known: Apple's, "
            "TensorRT-LLM's, ModelOpt's; speculators, Medusa's and Hydra's heads (docs/converting.md)"
        )
    tensors = {ours: weights.tensors[theirs] for ours, theirs in named.ours.items()}
    sizes = _sizes(tensors, where)
    notes = []
    if settings.get("num_draft_layers", sizes["num_draft_layers"]) != sizes["num_draft_layers"]:
        notes.append(
            f"config.json says num_draft_layers {settings['num_draft_layers']}, the tensors hold "
            f"{sizes['num_draft_layers']} blocks: the tensors count"
        )
    stated = {name: value for name, value in settings.items() if name != "num_draft_layers"}
    if named.dialect.startswith("TensorRT-LLM"):
        notes.append(
            "TensorRT-LLM runs this RNN without SiLU, Apple with it, and the file does not say how "
            "it was trained; --activation linear gives TensorRT-LLM's reading"
        )
        tensors, dropped = _without_padding(tensors, sizes, stated.get("vocab_size"))
        notes += [f"{dropped} rows that pad the vocabulary are left out"] if dropped else []
    try:
        config = DrafterConfig(**{**sizes, **stated})
    except ValueError as error:
        raise ValueError(f"{weights.folder / 'config.json'}: {error}") from None
    tensors.pop("emb_norm.weight", None)  # Apple's MLX port stores it and never applies it
    if config.num_draft_layers > len(tensors):  # do not build a million blocks to say that they are missing
        raise ValueError(
            f"{where}: its names number {config.num_draft_layers} blocks, and it holds {len(tensors)} tensors"
        )
    check_weights(RecurrentDrafter(config), tensors, where)  # type: ignore[arg-type]
    _check_floating(tensors, where)
    if named.beside:
        notes.append(f"{len(named.beside)} tensors of the base model beside the drafter are left out")
    return DrafterSource(where, weights.container, named, config, tensors, tuple(notes))


def _settings(path: Path) -> dict[str, Any]:
    """What a config says about the drafter, under our names; nothing where there is no config."""
    if not path.is_file():
        return {}
    config = read_json(path)
    if config.get("model_type") == MODEL_TYPE and "head" in config:
        raise ValueError(
            f"{path.parent} is a drafter of redrafter-mlx already and loads as it is; "
            "`redrafter-convert export` gives Apple's format"
        )
    inner = config.get("redrafter", config)
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: redrafter must be an object, not {inner!r}")
    found = {}
    for ours, keys in SETTINGS.items():
        key = next((key for key in keys if key in inner), None)
        if key is not None:
            found[ours] = inner[key]
    if not isinstance(found.get("rnn", True), bool):
        raise ValueError(f"{path}: rnn must be true or false, not {found['rnn']!r}")
    return found


def _sizes(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """V, H, X, N and `rnn` as the shapes say."""
    heads = [name for name in tensors if re.fullmatch(r"lm_head\.\d+\.weight", name)]
    if len(heads) != 1:
        found = ", ".join(sorted(heads)) or "none"
        raise ValueError(
            f"{where} must hold one output matrix lm_head.{{N}}.weight after its N blocks, found {found}"
        )
    shape = tensors[heads[0]].shape
    if len(shape) != 2:
        raise ValueError(f"{where}: {heads[0]} must have the shape (V, exit_dim), not {tuple(shape)}")
    hidden = shape[1] // 2
    for name, parts in (("input_proj.weight", 2), ("rnn_u.weight", 1), ("rnn_w.weight", 1)):
        if name in tensors:
            hidden = (tensors[name].shape or (0,))[-1] // parts
    return {
        "vocab_size": shape[0],
        "hidden_size": hidden,
        "exit_dim": shape[1],
        "num_draft_layers": int(heads[0].split(".")[1]),
        "rnn": any(name.startswith("rnn_") for name in tensors),
    }


def _without_padding(
    tensors: dict[str, Tensor], sizes: dict[str, Any], vocab: Any
) -> tuple[dict[str, Tensor], int]:
    """Cut the output matrix to the vocabulary: TensorRT-LLM pads it with zeros to a multiple of its ranks.

    Raises:
        ValueError: what would be cut off are weights.
    """
    surplus = sizes["vocab_size"] - vocab if type(vocab) is int and vocab > 0 else 0
    if surplus <= 0:
        return tensors, 0
    name = f"lm_head.{sizes['num_draft_layers']}.weight"
    rows = as_array(tensors[name])
    if mx.any(rows[vocab:] != 0).item():
        raise ValueError(
            f"config.json says vocab_size {vocab}, and {name} has {len(rows)} rows, of which those after are no padding"
        )
    return {**tensors, name: rows[:vocab]}, surplus


def _check_floating(tensors: dict[str, Tensor], where: str) -> None:
    wrong = [
        f"{n} ({dtype_name(t.dtype)})" for n, t in tensors.items() if not mx.issubdtype(t.dtype, mx.floating)
    ]
    if wrong:
        raise ValueError(f"{where} must hold floating-point weights, not {', '.join(wrong)}")


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """How to convert a drafter."""

    activation: str = "silu"
    target: str | None = None
    """model it must fit; its name and sizes are recorded"""
    dtype: str | None = None
    force: bool = False


def is_converted(path: Path) -> bool:
    """True for a folder of a drafter that loads as it is."""
    where = path / "config.json"
    config = read_json(where) if path.is_dir() and where.is_file() else {}
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        return "head" in config
    return kind in KINDS and (kind != SpeculatorConfig.model_type or is_ours(config))


def convert_drafter(
    source: str,
    out: Path,
    options: DrafterOptions,
    report: Report,
    approve: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the drafter at `source` as a folder that `redrafter_mlx.load_drafter` loads.

    Args:
        approve: called with the finished folder before that becomes `out`; what it raises keeps `out` as it was.

    Raises:
        FileNotFoundError, ValueError: see `read_drafter` and `published.Source.build`; or it does not fit the
            target. `out` is left as it was.
    """
    check_output(out, options.force)
    path = locate(source, "drafter")
    with output_folder(out, options.force) as part:
        save_drafter(_drafter(path, options, report), part)
        load_drafter(part)
        approve(part)


def _drafter(path: Path, options: DrafterOptions, report: Report) -> Any:
    """The drafter of a source, with what it is made for in its config."""
    found = read_published(path)
    recurrent = _recurrent(path, options, report) if found is None else None
    target = None if options.target is None else load_target(options.target)
    drafter: Any = recurrent if found is None else _published(found, target, options, report)
    if target is not None:
        drafter.attach(target)
        made_for = {"name": target.name, "hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        if recurrent is not None:
            made = changed(recurrent.config, embedding_scale=target.embedding_scale, target=made_for)
        else:
            made = replace(drafter.config, target=made_for)
        drafter.config = made
    return drafter


def _recurrent(path: Path, options: DrafterOptions, report: Report) -> RecurrentDrafter:
    found = read_drafter(path)
    report(f"{found.where}: {found.named.dialect} names, {found.container}")
    for note in found.notes:
        report(note)
    drafter = RecurrentDrafter(changed(found.config, activation=options.activation))
    arrays = {name: as_array(tensor) for name, tensor in found.tensors.items()}
    drafter.load_weights(list(cast_all(arrays, dtype_of(options.dtype), found.where).items()))
    return drafter


def _published(found: Source, target: Target | None, options: DrafterOptions, report: Report) -> Any:
    if options.activation != "silu":
        raise ValueError(
            f"--activation {options.activation} is for recurrent drafters, and {found.where} holds: {found.kind}"
        )
    report(f"{found.where}: {found.kind}, {found.container}")
    for note in found.notes:
        report(note)
    drafter = found.build(target)
    drafter.load_weights(list(cast_all(named_weights(drafter), dtype_of(options.dtype), found.where).items()))
    return drafter


def load_target(name: str) -> Target:
    """The target that a drafter is for, without any drafter."""
    return load(name, drafter="none").target


def cast_all(arrays: dict[str, mx.array], dtype: mx.Dtype | None, where: str) -> dict[str, mx.array]:
    """Floating weights in another dtype, which None leaves as they are.

    Raises:
        ValueError: one is no number, or is none that the dtype can hold.
    """
    check_finite(arrays, where)
    if dtype is None:
        return arrays
    cast = {name: cast_floating(array, dtype) for name, array in arrays.items()}
    check_finite(cast, f"{where} as {dtype_name(dtype)}")
    return cast
