"""The files of a training run: `last.safetensors` (weights, optimizer, step) and `metrics.jsonl`.

A checkpoint also holds the run's identity: everything that decides which weights come out. A folder is never taken for
a run that it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from redrafter_mlx.files import check_safetensors, write_safetensors

from .shards import durable_file

LAST, METRICS = "last.safetensors", "metrics.jsonl"
_UNSET = object()


@dataclass(slots=True)
class State:
    """Where a run is."""

    step: int = 0
    best: float = -1.0
    """Best held-out tokens per step so far; -1 before the first validation."""
    stale: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Time spent on training steps."""
    acceptance: tuple[float, ...] = ()
    """Of the last validation."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds."""

    state: State
    identity: dict[str, Any]
    weights: Any
    optimizer: Any


def save_checkpoint(
    folder: Path, state: State, identity: Mapping[str, Any], weights: Any, optimizer: Any
) -> None:
    """Write `last.safetensors`; it is on the disk when this returns."""
    arrays = dict(tree_flatten({"weights": weights, "optimizer": optimizer}))
    values = {
        "step": state.step, "best": state.best, "stale": state.stale, "seconds": state.seconds,
        "acceptance": state.acceptance, "identity": identity,
    }  # fmt: skip
    path = folder / LAST
    with durable_file(path) as file:
        write_safetensors(Path(file.name), arrays, {"state": json.dumps(values)})


def read_identity(folder: Path) -> tuple[State, dict[str, Any]] | None:
    """Where the run of a folder is, and its identity, without its weights; None if it has no checkpoint.

    Raises:
        ValueError: see `read_checkpoint`.
    """
    path = folder / LAST
    if not path.is_file():
        return None
    check_safetensors(path)
    loaded: Any = mx.load(str(path), return_metadata=True)  # maps the arrays and reads none
    try:
        values = json.loads(loaded[1]["state"])
        state = State(
            values["step"], values["best"], values["stale"], values["seconds"], tuple(values["acceptance"])
        )
        return state, values.get("identity", {})  # before there was one, other keys were compared
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(path, error) from None


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of a folder; None if it has none.

    Raises:
        ValueError: it is damaged, or not of this program.
    """
    found = read_identity(folder)
    if found is None:
        return None
    path = folder / LAST
    arrays: Any = mx.load(str(path))
    named: Any = tree_unflatten(list(arrays.items()))
    try:
        return Checkpoint(*found, named["weights"], named["optimizer"])
    except (KeyError, TypeError) as error:
        raise _not_ours(path, error) from None


def _not_ours(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a checkpoint of this program ({error}): delete it to train anew")


def check_identity(folder: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Compare a checkpoint's identity with that of the run which would continue it, in what `mine` names.

    Raises:
        ValueError: they differ; in what, and what to delete.
    """
    differing = [key for key in mine if theirs.get(key, _UNSET) != json.loads(json.dumps(mine[key]))]
    if differing:
        listed = ", ".join(
            f"{key} {theirs.get(key, 'not known')!r} there, {mine[key]!r} now" for key in differing
        )
        raise ValueError(
            f"{folder} holds a training with other options or data: {listed}. Use another folder, or delete "
            f"{folder / LAST} to train anew on the text that is there"
        )


def add_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Append a validation to `metrics.jsonl`."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(folder: Path, step: int | None) -> None:
    """Drop the validations after `step`, which a run that goes on from there makes again; None: all."""
    path = folder / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            reached = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
        if step is not None and reached <= step:
            kept.append(line + "\n")
    with durable_file(path) as file:
        file.write("".join(kept).encode())
