"""What a verified row and a draft cost on this machine, for this model, and where that is kept.

C(n), the seconds of one target forward over n rows, is nowhere a straight line: kernels change at certain row counts,
differently on every chip. So it is measured (`timing`), at first use of a (machine, model, dtype), and kept in the
cache folder. So are the seconds of a draft by width and length.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from redrafter_mlx import kernels
from redrafter_mlx.device import device_name
from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.files import cache_dir, named_weights, new_file
from redrafter_mlx.target import Target
from redrafter_mlx.tree import MAX_NODES

_log = logging.getLogger("redrafter_mlx")

VERSION = 17


@dataclass(slots=True)
class CostTable:
    """Seconds of a forward over n rows, and of a draft."""

    rows: dict[int, float]
    """C(n) at the measured n"""
    first_level: dict[int, float]
    """width -> extra seconds of a step with a one-level draft; negative if the draft overlaps host work"""
    per_level: dict[int, float]
    """width -> seconds of every further level; both are empty where there is no drafter"""
    waiting: float = 0.0
    """extra seconds of a step that waits for the text to be known, so that drafts can be looked up in it"""
    unrest: float = 1.0
    """how much slower than the fastest samples the middle ones were when this was measured"""
    attempts: int = 1
    """times it was measured, for its unrest"""

    def verify_seconds(self) -> np.ndarray:
        """C(n) for n = 0 ... MAX_NODES, straight lines between measured n; C(0) = 0."""
        known = sorted(self.rows)
        seconds = np.interp(np.arange(MAX_NODES + 1), known, [self.rows[n] for n in known])
        if known[-1] < MAX_NODES:  # stopped measuring where it no longer could pay: go on as steeply
            slope = self.rows[known[-1]] / known[-1]
            seconds[known[-1] :] = self.rows[known[-1]] + slope * np.arange(MAX_NODES + 1 - known[-1])
        seconds[0] = 0.0
        return seconds

    def draft_seconds(self, width: int, length: int) -> float:
        """Seconds that a draft with W = width, L = length (root counted) adds to a step."""
        known = sorted(self.first_level)
        if not known:
            raise ValueError("the seconds of a draft were asked for, and this table is of a target alone")
        first = float(np.interp(width, known, [self.first_level[w] for w in known]))
        level = float(np.interp(width, known, [self.per_level[w] for w in known]))
        return max(0.0, first + level * (length - 2))

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        names = ("rows", "first_level", "per_level")
        parts = {name: {str(k): v for k, v in getattr(self, name).items()} for name in names}
        others = {"waiting": self.waiting, "unrest": self.unrest, "attempts": self.attempts}
        return {"version": VERSION, **parts, **others}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostTable:
        """Read what `to_dict` wrote.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError: of another version, or damaged.
        """
        if values.get("version") != VERSION:
            raise ValueError("another version")
        names = ("rows", "first_level", "per_level")
        parts = [{int(k): float(v) for k, v in values[name].items()} for name in names]
        rows, widths = parts[0], set(parts[1])
        waiting, unrest, attempts = float(values["waiting"]), float(values["unrest"]), int(values["attempts"])
        if not all(
            math.isfinite(v) for v in [waiting, unrest, *(v for part in parts for v in part.values())]
        ):
            raise ValueError("seconds that are no numbers")
        if widths != set(parts[2]) or 1 not in rows or min(rows.values()) <= 0:
            raise ValueError("parts are missing")
        if not all(1 <= number <= MAX_NODES for part in parts for number in part):
            raise ValueError("rows or widths out of range")
        return cls(parts[0], parts[1], parts[2], max(0.0, waiting), unrest, attempts)


def keep_table(table: CostTable, path: Path) -> None:
    """Write a table to the cache folder; log a warning if that fails."""
    try:
        with new_file(path) as part:
            part.write_text(json.dumps(table.to_dict(), indent=1))
    except OSError as error:
        _log.warning("the measurement could not be kept in %s: %s", path, error)


def cache_path(target: Target, drafter: Drafter | None) -> Path:
    """One file per device, BLAS and its threads, MLX version, model sizes and dtypes, drafter."""
    identity = [
        device_name(),
        *kernels.identity(),
        importlib.metadata.version("mlx"),
        target.name,
        len(target.model.layers),
        _sizes(target.model),
        None if drafter is None else drafter.cost_key(),
    ]
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
    return cache_dir() / "cost" / f"{digest}.json"


def _sizes(module: nn.Module) -> list[str]:
    return sorted({f"{array.shape}{array.dtype}" for array in named_weights(module).values()})
