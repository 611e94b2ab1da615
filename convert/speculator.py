"""IBM's MLPSpeculator and Snowflake's Arctic speculators as they are published -> a drafter folder of ours.

Their config says what the tensors mean, so it is needed. `emb_dim` is the target's hidden size in IBM's configs, and
the embedding's in Snowflake's, which have `input_hidden_dim` for the former; Snowflake writes sizes as text ("4096"),
with dots between those of several layers ("4096.4096"), which are not supported here.

Letters: H hidden size of the target, D inner size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.config import shown
from redrafter_mlx.drafters.kinds import build_drafter
from redrafter_mlx.drafters.speculator import METHODS, MODEL_TYPE, Speculator, SpeculatorConfig
from redrafter_mlx.files import read_json
from redrafter_mlx.target import Target

from .source import Tensor, as_array, read_weights

ARCHITECTURES = (
    "MLPSpeculatorPreTrainedModel",  # IBM
    "ArcticMLPSpeculatorPreTrainedModel",
    "ArcticLSTMSpeculatorPreTrainedModel",  # also with method sum_rnn
    "MLPVariantSpeculatorPreTrainedModel",  # the same, earlier
)

PREFIX = re.compile(r"(?:module\.|_orig_mod\.|model\.)*speculator\.")

GATES = ("forget", "input", "output", "cell")
"""Order in which ours joins them."""

_STAGE = re.compile(r"(emb|proj|ln|head)\.(\d+)\.(?:0\.)?(weight|bias)")  # .0. where each is an nn.Sequential
_EMBEDDING = re.compile(rf"({'|'.join(GATES)})_emb\.0\.weight")
_PROJECTION = re.compile(rf"({'|'.join(GATES)})_proj\.([01])\.weight")
_NORM = re.compile(r"(cell|state)_ln\.0\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class SpeculatorSource:
    """A speculator found in somebody's checkpoint, its tensors not compared yet."""

    where: str
    container: str
    config: SpeculatorConfig
    parts: dict[str, dict[str, list[str]]]
    """our name -> gate ("" where there are none) -> the source's names, all of which must be equal"""
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    """what the user should know about it"""

    @property
    def kind(self) -> str:
        """In words."""
        return "Arctic-LSTM speculator" if self.config.method == "sum_lstm" else "MLP speculator"

    @property
    def values(self) -> dict[str, Any]:
        """The config's."""
        return {each.name: getattr(self.config, each.name) for each in fields(self.config)}

    def build(self, target: Target | None) -> Speculator:
        """See `build_speculator`; the target is not needed."""
        return build_speculator(self)


def is_speculator(path: Path) -> bool:
    """True where the config says so, or, without a config, the tensors' names."""
    config = _config_path(path)
    if config.is_file():
        return _is_config(read_json(config))
    bare = {PREFIX.sub("", name, count=1) for name in read_weights(path).tensors}
    return any(re.fullmatch(r"(emb|forget_emb)\.0\.(0\.)?weight", name) for name in bare)


def is_ours(config: dict[str, Any]) -> bool:
    """True for the config of a speculator that was converted. (The published ones have the same `model_type`.)"""
    return config.get("model_type") == MODEL_TYPE and "hidden_size" in config and "emb_dim" not in config


def read_speculator(path: Path) -> SpeculatorSource:
    """Find the speculator in a folder or file: its config, and what every tensor's name means.

    Raises:
        FileNotFoundError, ValueError: no config, no weights, or something in them that is not supported here.
    """
    where = _config_path(path)
    if not where.is_file():
        raise FileNotFoundError(
            f"no file {where}: without its config a speculator's tensors can mean several things"
        )
    values = read_json(where)
    if is_ours(values):
        raise ValueError(f"{where.parent} is a speculator of redrafter-mlx already and loads as it is")
    config = _read_config(values, str(where))
    weights = read_weights(path)
    files = ", ".join(str(file) for file in weights.files)
    prefixed = [name for name in weights.tensors if PREFIX.match(name)]
    names = prefixed or list(weights.tensors)
    beside = len(weights.tensors) - len(names)
    notes = [f"{beside} tensors beside the speculator are left out"] if beside else []
    tensors = {name: weights.tensors[name] for name in names}
    return SpeculatorSource(
        files, weights.container, config, _parts(names, config, files), tensors, tuple(notes)
    )


def build_speculator(found: SpeculatorSource) -> Speculator:
    """The speculator with its weights.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen, no finite numbers, or differ though the config
            says that they are one.
    """
    weights = {}
    for ours, gates in found.parts.items():
        arrays = [_one(found, names) for _, names in sorted(gates.items(), key=lambda gate: _order(gate[0]))]
        axis = 1 if ours.startswith("emb.") else 0
        weights[ours] = _joined(arrays, axis, f"{found.where}: {', '.join(_firsts(gates))}")
    speculator = build_drafter(Speculator, found.config, weights, found.where)
    assert isinstance(speculator, Speculator)
    speculator.load_weights(list(weights.items()))
    return speculator


def _config_path(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "config.json"


def _is_config(values: dict[str, Any]) -> bool:
    return values.get("model_type") == MODEL_TYPE or any(
        name in ARCHITECTURES for name in _architectures(values)
    )


def _architectures(values: dict[str, Any]) -> list[Any]:
    found = values.get("architectures") or []
    return found if isinstance(found, list) else [found]


def _read_config(values: dict[str, Any], where: str) -> SpeculatorConfig:
    for name in _architectures(values):
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{where}: architectures {shown(name)} is not supported, only {known}")
    method = values.get("method", METHODS[0])
    if method not in METHODS:
        raise ValueError(f"{where}: method {shown(method)} is not supported, only {' and '.join(METHODS)}")
    of_snowflake = "input_hidden_dim" in values
    needed = ["vocab_size", "n_predict", "emb_dim"]
    needed += ["input_hidden_dim", "inner_dim", "proj_dim"] if of_snowflake or method == "sum_lstm" else []
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if of_snowflake:
        hidden = _size(values, "input_hidden_dim", where)
        inner = _size(values, "inner_dim", where)
        for name in ("proj_dim", "emb_dim"):
            if _size(values, name, where) != inner:
                raise ValueError(f"{where}: {name} must be inner_dim {inner}, not {shown(values[name])}")
    else:
        hidden = _size(values, "emb_dim", where)
        inner = _size(values, "inner_dim", where) if values.get("inner_dim") else hidden
    kept: dict[str, Any] = {"vocab_size": values["vocab_size"], "n_predict": values["n_predict"]}
    kept |= {"hidden_size": hidden, "inner_size": inner, "method": method}
    flags = ["tie_weights", "scale_input"]
    flags += (
        ["tie_lstm_embs"] if method == "sum_lstm" else []
    )  # Snowflake's trainer writes it into every config
    kept |= {name: values[name] for name in flags if values.get(name) is not None}
    made_for = values.get("base_model_name_or_path")
    if isinstance(made_for, str):
        kept["target"] = {"name": made_for, "hidden_size": hidden, "vocab_size": values["vocab_size"]}
    return SpeculatorConfig.from_dict(kept, where)[0]


def _size(values: dict[str, Any], name: str, where: str) -> int:
    """4096, "4096", [4096] or "[4096]"."""
    match = re.fullmatch(r"\[?\s*'?(\d{1,9})'?\s*\]?", str(values[name]))
    if match is None:
        raise ValueError(
            f"{where}: {name} {shown(values[name])} is not supported: it must be one size, not those of several layers"
        )
    return int(match[1])


def _parts(names: Iterable[str], config: SpeculatorConfig, where: str) -> dict[str, dict[str, list[str]]]:
    parts: dict[str, dict[str, list[str]]] = {}
    unknown = []
    for name in sorted(
        names, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
    ):
        found = _ours(PREFIX.sub("", name, count=1), config)
        if found is None:
            unknown.append(name)
        else:
            parts.setdefault(found[0], {}).setdefault(found[1], []).append(name)
    if unknown:
        listed = ", ".join(unknown[:6]) + (", ..." if len(unknown) > 6 else "")
        raise ValueError(
            f"{where}: {len(unknown)} tensors have names that a speculator with method {config.method} and "
            f"n_predict {config.n_predict} does not have ({listed})"
        )
    if config.method == "sum_lstm":
        _check_gates(parts, config, where)
    return parts


def _ours(bare: str, config: SpeculatorConfig) -> tuple[str, str] | None:
    """Our name of a tensor, and the gate it belongs to."""
    is_lstm = config.method == "sum_lstm"
    if match := _STAGE.fullmatch(bare):
        kind, stage, end = match[1], int(match[2]), match[3]
        if stage >= config.n_predict or (is_lstm and kind != "head") or (end == "bias" and kind != "ln"):
            return None
        count = config.num_projections if kind == "proj" else config.num_embeddings
        return f"{kind}.{min(stage, count - 1)}.{end}", ""
    if is_lstm and (match := _EMBEDDING.fullmatch(bare)):
        return "emb.0.weight", "" if config.tie_lstm_embs else match[1]
    if is_lstm and (match := _PROJECTION.fullmatch(bare)):
        return f"proj.{match[2]}.weight", match[1]
    if is_lstm and (match := _NORM.fullmatch(bare)):
        return f"{match[1]}_ln.{match[2]}", ""
    return None


def _check_gates(parts: dict[str, dict[str, list[str]]], config: SpeculatorConfig, where: str) -> None:
    needed = [("proj.0.weight", "{}_proj.0.weight"), ("proj.1.weight", "{}_proj.1.weight")]
    needed += [] if config.tie_lstm_embs else [("emb.0.weight", "{}_emb.0.weight")]
    missing = [
        theirs.format(gate) for ours, theirs in needed for gate in GATES if gate not in parts.get(ours, {})
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _one(found: SpeculatorSource, names: list[str]) -> mx.array:
    """The tensor that all these names stand for."""
    first = as_array(found.tensors[names[0]])
    for name in names[1:]:
        other = as_array(found.tensors[name])
        if other.dtype != first.dtype or not mx.array_equal(first, other, equal_nan=True).item():
            key = "tie_lstm_embs" if "_emb." in name else "tie_weights"
            raise ValueError(f"{found.where}: {key} is true in its config, but {names[0]} and {name} differ")
    return first


def _joined(arrays: list[mx.array], axis: int, where: str) -> mx.array:
    if len(arrays) == 1:
        return arrays[0]
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{where} must be matrices of one shape, not {', '.join(map(str, shapes))}")
    return mx.concatenate(arrays, axis=axis)


def _firsts(gates: dict[str, list[str]]) -> list[str]:
    return [names[0] for names in gates.values()]


def _order(gate: str) -> int:
    return GATES.index(gate) if gate else 0
