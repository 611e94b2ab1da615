"""What the converters of Medusa's and Hydra's heads share: counting what a file holds, and comparing all of it.

The sizes come from the tensors: published configs count heads wrongly (5 in the file, 2 in the config) or lack sizes.
Blocks that their authors' code applies several times are in a file once for each time. They are stored once here, where
the copies are equal to the bit in every head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.heads import MAX_LAYERS, HeadsConfig, HeadsDrafter
from redrafter_mlx.drafters.kinds import build_drafter
from redrafter_mlx.files import named_weights, read_json
from redrafter_mlx.target import Target
from redrafter_mlx.tree import MAX_NODES

from .source import Tensor, as_array, dtype_name, read_weights

_WRAPPED = r"(?:module\.|_orig_mod\.)*"
"""What data parallelism and torch.compile put before a name."""

Finish = Callable[[dict[str, Any], Target | None], dict[str, Any]]
"""Sizes that the tensors say, and the target where it is named -> all values of the config."""


@dataclass(frozen=True, slots=True)
class HeadsSource:
    """Heads found in somebody's checkpoint, their shapes not compared yet."""

    where: str
    container: str
    kind: str
    """in words"""
    make: type[HeadsDrafter]
    values: dict[str, Any]
    """what is known of the config"""
    finish: Finish
    names: dict[str, str]
    """our name of every tensor that there must be -> the source's"""
    tensors: dict[str, Tensor]
    """the source's name -> tensor, those left out not among them"""
    notes: tuple[str, ...]
    """what the user should know about it"""

    def build(self, target: Target | None) -> HeadsDrafter:
        """The drafter with its weights.

        Raises:
            ValueError: the file does not say all and no target is named; tensors that are missing, misshapen, or no
                finite numbers.
        """
        try:
            config: HeadsConfig = self.make.Config(**self.finish(self.values, target))  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        self._check(self.make(config))
        arrays = {ours: as_array(self.tensors[theirs]) for ours, theirs in self.names.items()}
        config, arrays = tied(config, arrays)
        drafter = build_drafter(self.make, config, arrays, self.where)
        assert isinstance(drafter, HeadsDrafter)
        drafter.load_weights(list(arrays.items()))
        return drafter

    def _check(self, drafter: HeadsDrafter) -> None:
        expected = {ours: tuple(array.shape) for ours, array in named_weights(drafter).items()}
        wrong = []
        for ours, theirs in self.names.items():
            if theirs not in self.tensors:
                wrong.append(f"{theirs} {expected[ours]} is missing")
                continue
            tensor = self.tensors[theirs]
            if tuple(tensor.shape) != expected[ours]:
                wrong.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {expected[ours]}")
            elif ours != "d2t" and not mx.issubdtype(tensor.dtype, mx.floating):
                wrong.append(f"{theirs} cannot be of dtype {dtype_name(tensor.dtype)}")
        if wrong:
            raise ValueError(f"{self.where} does not hold the heads that its names say: {'; '.join(wrong)}")


def tied(config: HeadsConfig, arrays: Mapping[str, mx.array]) -> tuple[HeadsConfig, dict[str, mx.array]]:
    """The config and tensors with blocks that are the same in every head stored once."""
    stored = config.num_layers
    while stored > 1 and all(
        _equal(array, arrays.get(name.replace(f".blocks.{stored - 1}.", f".blocks.{stored - 2}.")))
        and _is_linear(arrays, name, stored)
        for name, array in arrays.items()
        if f".blocks.{stored - 1}." in name
    ):
        stored -= 1
    dropped = {f".blocks.{index}." for index in range(stored, config.num_layers)}
    kept = {name: array for name, array in arrays.items() if not any(part in name for part in dropped)}
    return (replace(config, num_blocks=stored) if dropped else config), kept


def _is_linear(arrays: Mapping[str, mx.array], name: str, stored: int) -> bool:
    """True where the block before the last is one that can be applied again."""
    head = name.split(".blocks.")[0]
    return f"{head}.blocks.{stored - 2}.residual.weight" not in arrays


def _equal(one: mx.array, other: mx.array | None) -> bool:
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(mx.array_equal(one, other, equal_nan=True).item())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Somebody's tensors, under their names without what stands before them, and the config beside them."""

    where: str
    files: tuple[Path, ...]
    container: str
    config: dict[str, Any]
    """empty where there is none"""
    tensors: dict[str, Tensor]
    beside: int
    """tensors of something else in the same files, left out"""


def read_checkpoint(path: Path, prefix: str) -> Checkpoint:
    """Read the tensors whose names begin with `prefix`, a pattern; all of them where none does.

    Raises:
        FileNotFoundError, ValueError: no weights; two names that are the same without what stands before them.
    """
    weights = read_weights(path)
    where = ", ".join(str(file) for file in weights.files)
    pattern = re.compile(f"{_WRAPPED}{prefix}")
    prefixed = [name for name in weights.tensors if pattern.match(name)]
    tensors: dict[str, Tensor] = {}
    for name in prefixed or weights.tensors:
        bare = re.sub(f"^{_WRAPPED}", "", pattern.sub("", name, count=1))
        if bare in tensors:
            raise ValueError(f"{where} holds {bare} twice: as {name} and under another prefix")
        tensors[bare] = weights.tensors[name]
    beside = len(weights.tensors) - len(tensors)
    return Checkpoint(where, weights.files, weights.container, read_config(path), tensors, beside)


def read_config(path: Path) -> dict[str, Any]:
    """The config beside weights; empty where there is none."""
    where = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(where) if where.is_file() else {}


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest index that `pattern` captures in a name; 0 where it matches none."""
    found = (re.fullmatch(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def check_counts(heads: int, layers: int, where: str) -> None:
    """Check counts before anything is made for every head and layer.

    Raises:
        ValueError: none, or more than there can be.
    """
    for what, found, most in (("heads", heads, MAX_NODES - 1), ("blocks in a head", layers, MAX_LAYERS)):
        if not 1 <= found <= most:
            raise ValueError(f"{where}: its names are those of {found} {what}, and there can be 1 to {most}")


def refuse_unknown(names: Iterable[str], known: Iterable[str], kind: str, where: str) -> None:
    """Refuse tensors that such heads do not have.

    Raises:
        ValueError: there are some.
    """
    expected = set(known)
    if unknown := [name for name in names if name not in expected]:
        listed = ", ".join(unknown[:6]) + (", ..." if len(unknown) > 6 else "")
        raise ValueError(f"{where}: {len(unknown)} tensors have names that {kind} do not have ({listed})")


def notes_on_counts(config: dict[str, Any], stated: Iterable[tuple[str, int]]) -> list[str]:
    """A note for every count (key, as found) that the config states otherwise."""
    return [
        f"config.json says {key} {config[key]}, the tensors hold {found}: the tensors count"
        for key, found in stated
        if config.get(key, found) != found
    ]


def made_for(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the target that a published config names."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or "vocab_size" not in values:
        return {}
    return {"target": {"name": name, **{key: values[key] for key in ("hidden_size", "vocab_size")}}}


def shape_of(tensors: Mapping[str, Tensor], names: Iterable[str], where: str) -> tuple[int, int]:
    """The shape of a matrix that says a size: the first of these that is there, so that all others that are not there
    can be named together.

    Raises:
        ValueError: all are missing, or it is no matrix.
    """
    listed = list(names)
    name = next((name for name in listed if name in tensors), None)
    if name is None:
        raise ValueError(f"{where} lacks {', '.join(listed)}")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{where}: {name} must be a matrix, not of shape {shape}")
    return shape[0], shape[1]
