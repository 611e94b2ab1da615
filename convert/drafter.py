"""Drafters: theirs to ours (`convert_drafter`) and recurrent ones of ours to Apple's (`export_drafter`).

Of a recurrent drafter the sizes come from the tensors: configs of other tools lack the vocabulary or count
the residual blocks wrongly. Speculators are read by `speculator`.

Letters: H hidden size, X exit_dim, V vocabulary, N residual blocks (num_draft_layers).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from redrafter_mlx.drafters.kinds import WEIGHTS, load_drafter, load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig, RecurrentDrafter, changed, full_head
from redrafter_mlx.drafters.speculator import Speculator
from redrafter_mlx.files import cast_floating, check_weights, named_weights, read_json
from redrafter_mlx.loading.load import load
from redrafter_mlx.target import Target

from .names import SETTINGS, Named, translate
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
from .speculator import build_speculator, is_speculator, read_speculator

_NEVER = -1e4  # logit of a token outside a reduced vocabulary; fits float16, and exp(-1e4) is 0


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
            "TensorRT-LLM's, ModelOpt's, and speculators with their config (docs/converting.md)"
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
    """Cut the output matrix to the vocabulary: TensorRT-LLM pads it to a multiple of its ranks."""
    surplus = sizes["vocab_size"] - vocab if isinstance(vocab, int) else 0
    if surplus <= 0:
        return tensors, 0
    name = f"lm_head.{sizes['num_draft_layers']}.weight"
    return {**tensors, name: as_array(tensors[name])[:vocab]}, surplus


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


def convert_drafter(source: str, out: Path, options: DrafterOptions, report: Report) -> None:
    """Write the drafter at `source` as a folder that `redrafter_mlx.load_drafter` loads.

    Raises:
        FileNotFoundError, ValueError: see `read_drafter`, `read_speculator` and `build_speculator`; or it does
            not fit the target. `out` is left as it was.
    """
    check_output(out, options.force)
    path = locate(source, "drafter")
    if is_speculator(path):
        drafter: RecurrentDrafter | Speculator = _speculator(path, options, report)
    else:
        drafter = _recurrent(path, options, report)
    if options.target is not None:
        target = _load_target(options.target)
        drafter.attach(target)
        made_for = {"name": target.name, "hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        if isinstance(drafter, RecurrentDrafter):
            drafter.config = changed(drafter.config, embedding_scale=target.embedding_scale, target=made_for)
        else:
            drafter.config = replace(drafter.config, target=made_for)
    with output_folder(out, options.force) as part:
        save_drafter(drafter, part)
        load_drafter(part)


def _recurrent(path: Path, options: DrafterOptions, report: Report) -> RecurrentDrafter:
    found = read_drafter(path)
    report(f"{found.where}: {found.named.dialect} names, {found.container}")
    for note in found.notes:
        report(note)
    drafter = RecurrentDrafter(changed(found.config, activation=options.activation))
    arrays = {name: as_array(tensor) for name, tensor in found.tensors.items()}
    drafter.load_weights(list(_cast(arrays, dtype_of(options.dtype)).items()))
    return drafter


def _speculator(path: Path, options: DrafterOptions, report: Report) -> Speculator:
    if options.activation != "silu":
        raise ValueError(
            f"--activation {options.activation} is for recurrent drafters, and {path} is a speculator"
        )
    found = read_speculator(path)
    report(f"{found.where}: {found.kind}, {found.container}")
    for note in found.notes:
        report(note)
    drafter = build_speculator(found)
    drafter.load_weights(list(_cast(named_weights(drafter), dtype_of(options.dtype)).items()))
    return drafter


def _load_target(name: str) -> Target:
    return load(name, drafter="none").target


def _cast(arrays: dict[str, mx.array], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    return {name: cast_floating(array, dtype) for name, array in arrays.items()}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export a drafter."""

    target: str | None = None
    """the model whose output rows a factored head needs"""
    dtype: str | None = None
    force: bool = False


def export_drafter(folder: str, out: Path, options: ExportOptions, report: Report) -> None:
    """Write one of our drafters as Apple's trainer saves it: Apple's names, a full head, floats.

    Raises:
        FileNotFoundError, ValueError: no drafter there, or one that Apple's format cannot express.
    """
    check_output(out, options.force)
    drafter = load_recurrent(locate(folder, "drafter"))
    config = drafter.config
    if config.context_layers:
        raise ValueError(
            f"{folder} reads the target's layers {list(config.context_layers)}; Apple's format "
            "knows the last hidden state only. A drafter that can be exported is trained with "
            "`redrafter train --context-layers none`"
        )
    if config.quantization:
        report("the weights are quantized: they are exported as rounded")
        dequantize_model(drafter)
        drafter.config = changed(config, quantization=None)
    if config.head == "factored":
        if options.target is None:
            raise ValueError(
                f"--target is needed: {folder} has head 'factored' and reads the target's output rows"
            )
        drafter.attach(_load_target(options.target))
        drafter = full_head(drafter)
    if config.draft_vocab_size is not None:
        drafter = full_vocabulary(drafter)
        report(
            f"a feature is added (exit_dim {drafter.config.exit_dim}) so that tokens outside the "
            f"drafter's {config.draft_vocab_size} are never drafted"
        )
    if config.activation == "linear":
        report("its RNN is linear: right for TensorRT-LLM, while Apple's code would apply SiLU")
    if config.calibration:
        report("the calibration of its probabilities is left out: Apple's format has no place for it")
    if config.embedding_scale != 1.0:
        report(f"it reads embeddings scaled by {config.embedding_scale}; Apple's format does not say so")
    arrays = dict(tree_flatten(drafter.parameters()))
    dtypes = {array.dtype for array in arrays.values()}
    widest = next(iter(dtypes)) if len(dtypes) == 1 else mx.float32
    with output_folder(out, options.force) as part:
        _save_as_apple(drafter.config, _cast(arrays, dtype_of(options.dtype) or widest), part)
        load_recurrent(part)


def _save_as_apple(config: DrafterConfig, arrays: dict[str, mx.array], part: Path) -> None:
    values = {
        "architectures": ["Drafter"],
        "exit_dim": config.exit_dim,
        "hidden_size": config.hidden_size,
        "model_type": MODEL_TYPE,
        "num_draft_layers": config.num_draft_layers,
        "num_lookback_tokens": -1,
        "rnn": config.rnn,
        "torch_dtype": dtype_name(next(iter(arrays.values())).dtype),
        "vocab_size": config.vocab_size,
    }
    (part / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    mx.save_safetensors(str(part / WEIGHTS), arrays, metadata={"format": "pt"})


def full_vocabulary(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """A full head over a reduced vocabulary as one over all V tokens, with the same probabilities.

    The head has no bias, so a feature that is always 1 is added behind the others (a residual block
    adds SiLU(0) = 0 to it), and the output matrix gives it -1e4 for the tokens that were left out.
    """
    config = drafter.config
    ids = drafter.target_ids()
    assert ids is not None and config.head == "full", "see export_drafter"
    old = dict(tree_flatten(drafter.parameters()))
    size = config.exit_dim
    extra = 2 if size + 1 == 2 * config.hidden_size else 1  # exit_dim 2H would mean: no input_proj
    head = f"lm_head.{config.num_draft_layers}.weight"
    dtype = old[head].dtype
    new = {name: array for name, array in old.items() if name.startswith("rnn_")}
    weight = old.get("input_proj.weight", mx.eye(size, dtype=dtype))
    bias = old.get("input_proj.bias", mx.zeros((size,), dtype=dtype))
    one = mx.array([1.0] + [0.0] * (extra - 1), dtype=dtype)
    new["input_proj.weight"] = mx.pad(weight, [(0, extra), (0, 0)])  # (X + extra, 2H)
    new["input_proj.bias"] = mx.concatenate([bias, one])
    for i in range(config.num_draft_layers):
        name = f"lm_head.{i}.linear"
        new[f"{name}.weight"] = mx.pad(old[f"{name}.weight"], [(0, extra), (0, extra)])
        new[f"{name}.bias"] = mx.pad(old[f"{name}.bias"], (0, extra))
    rows = mx.zeros((config.vocab_size, size + extra), dtype=dtype)
    rows[:, size] = _NEVER
    rows[ids] = mx.pad(old[head], [(0, 0), (0, extra)])
    new[head] = rows
    full = RecurrentDrafter(changed(config, draft_vocab_size=None, exit_dim=size + extra))
    full.load_weights(list(new.items()))
    return full
