"""What a verified row and a draft cost on this machine, for this model.

C(n), the seconds of one target forward over n rows, is nowhere a straight line: kernels change at certain
row counts, differently on every chip (docs/performance.md). So it is measured, at first use of a (machine,
model, dtype), and kept in the cache folder. So are the seconds of a beam search by width and length.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import BLAS
from .decode import Decoder
from .default_model import cache_dir
from .device import device_name, on_gpu
from .drafter import RecurrentDrafter
from .files import new_file, read_json
from .policy import Fixed, Off, Policy
from .sampling import Sampling
from .search import search
from .target import Target
from .tree import MAX_NODES, Beam, chain
from .weights import named

_log = logging.getLogger("redrafter_mlx")

Job = Callable[[], float]
"""measures something; its seconds"""

# Where MLX's kernels change, and between: 5-row tiles, 6/10/12/13/14/15/18/25/32/33-row limits on
# Metal. A CPU is steeper, and slow enough that every size measured costs the others samples.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 16, 20, 24, 32, 33, 48, 64)
CPU_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
WIDTHS = (1, 2, 4, 8)
BUDGET_SECONDS = 6.0
CONTEXT = 128  # positions in the cache while measuring
DEAR = 2.5  # plain steps
ROUNDS, STEPS = 8, 2  # of all measurements; decode steps in one
VERSION = 15


@dataclass(slots=True)
class CostTable:
    """Seconds of a forward over n rows, and of a beam search."""

    rows: dict[int, float]
    """C(n) at the measured n"""
    first_level: dict[int, float]
    """seconds that a search with one level, and all else that drafting needs, adds to the verification, by width;
    below 0 where that hides behind the host's work"""
    per_level: dict[int, float]
    """seconds of every further level, by width"""

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
        """Seconds that a search with W = width, L = length (root counted) adds to a step."""
        known = sorted(self.first_level)
        first = float(np.interp(width, known, [self.first_level[w] for w in known]))
        level = float(np.interp(width, known, [self.per_level[w] for w in known]))
        return max(0.0, first + level * (length - 2))

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            **{
                name: {str(k): v for k, v in getattr(self, name).items()}
                for name in ("rows", "first_level", "per_level")
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostTable:
        if values.get("version") != VERSION:
            raise ValueError("another version")
        parts = [
            {int(k): float(v) for k, v in values[name].items()}
            for name in ("rows", "first_level", "per_level")
        ]
        return cls(*parts)


def cost_table(target: Target, drafter: RecurrentDrafter, fresh: bool = False) -> CostTable:
    """The table for this machine, model and drafter: from the cache folder, or measured now (under
    10 s).
    """
    path = cache_path(target, drafter)
    if not fresh:
        try:
            return CostTable.from_dict(read_json(path))
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s cannot be used (%s), measuring again", path, error)
    _log.info("measuring what a verified row costs here, once")
    table = measure(target, drafter)
    try:
        with new_file(path) as part:
            part.write_text(json.dumps(table.to_dict(), indent=1))
    except OSError as error:
        _log.warning("the measurement could not be kept in %s: %s", path, error)
    return table


def cache_path(target: Target, drafter: RecurrentDrafter) -> Path:
    """One file per device, BLAS and its threads, MLX version, model sizes and dtypes, drafter sizes."""

    def sizes(module: Any) -> list[str]:
        return sorted({f"{array.shape}{array.dtype}" for array in named(module).values()})

    version = importlib.metadata.version("mlx")
    config = drafter.config.to_dict()
    config = {k: v for k, v in config.items() if k not in ("training", "calibration", "target")}
    identity = [
        device_name(),
        BLAS,
        sorted((key, value) for key, value in os.environ.items() if key.endswith("_NUM_THREADS")),
        version,
        target.name,
        len(target.model.layers),
        sizes(target.model),
        config,
    ]
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
    return cache_dir() / "cost" / f"{digest}.json"


def measure(target: Target, drafter: RecurrentDrafter, budget: float = BUDGET_SECONDS) -> CostTable:
    """Measure within about `budget` seconds, everything in turn so that a slow moment hits all alike.

    Forwards and searches are timed alone. What a decode step takes beyond them, and what of the search it hides
    behind the host's work, only decoding shows: so steps are run, plain ones and some of every width. The plain ones
    give C(1); what drafted ones take beyond their parts (or less than them), the same for all widths, goes to the
    first level.
    """
    cache = target.new_cache()
    cache.reserve(CONTEXT + MAX_NODES)
    tokens = mx.arange(CONTEXT, dtype=mx.int32) % target.vocab_size
    mx.eval(target.extend(tokens, cache).hidden)
    context = mx.zeros((drafter.config.context_size,), dtype=target.dtype)

    def forward(rows: int) -> Job:
        return lambda: _seconds(lambda: mx.argmax(target.verify(chain(tokens[:rows]), cache).logits, axis=-1))

    def draft(width: int, length: int) -> Job:
        root = mx.array(0, dtype=mx.int32)

        def run() -> float:
            levels = search(drafter, context, root, target.embed, width=width, length=length)
            begun = time.perf_counter()
            mx.eval(levels.logprobs)
            return time.perf_counter() - begun

        return run

    def step(policy: Policy) -> Job:
        decoder = Decoder(target, drafter, target.new_cache(), policy, Sampling())
        decoder.prefill(tokens.tolist())  # type: ignore[arg-type]
        return partial(_step_seconds, decoder.steps())

    widths = [w for w in WIDTHS if w <= drafter.config.draft_vocab]
    beams = [Beam(w, 3, min(4, 1 + 2 * w)) for w in widths]
    jobs: dict[tuple[str, int, int], Job] = {("plain", 0, 0): step(Off())}
    for beam in beams:
        jobs["drafted", beam.width, 3] = step(Fixed(beam))
    for width in widths:
        for length in (2, 5):
            jobs["draft", width, length] = draft(width, length)
    for rows in ROWS if on_gpu() else CPU_ROWS:
        jobs["rows", rows, 0] = forward(rows)
    times = _interleaved(jobs, budget)
    verify = {rows: seconds for (kind, rows, _), seconds in times.items() if kind == "rows"}
    verify[1] = times["plain", 0, 0]
    if not on_gpu():
        verify = _rising(verify)
    level = _rising({w: max(0.0, (times["draft", w, 5] - times["draft", w, 2]) / 3) for w in widths})
    alone = _rising({w: times["draft", w, 2] for w in widths})
    beyond = [
        times["drafted", b.width, 3] - verify[b.nodes or 0] - alone[b.width] - level[b.width] for b in beams
    ]
    return CostTable(verify, {w: alone[w] + float(np.mean(beyond)) for w in widths}, level)


def _rising(seconds: dict[int, float]) -> dict[int, float]:
    """The nearest values that do not fall (means of neighbours that do): a wider search does no less, and on a CPU
    nor do more rows, so what says otherwise is noise."""
    runs: list[list[float]] = []
    for value in seconds.values():
        runs.append([value])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    pooled = [float(np.mean(run)) for run in runs for _ in run]
    return dict(zip(seconds, pooled, strict=True))


def _step_seconds(steps: Iterator[list[int]]) -> float:
    """Seconds of one of the next decode steps."""
    mx.synchronize()  # another decoder's last step was launched ahead
    next(steps)  # has nothing launched ahead of it
    begun = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return (time.perf_counter() - begun) / STEPS


def _seconds(build: Callable[[], mx.array]) -> float:
    begun = time.perf_counter()
    mx.eval(build())
    return time.perf_counter() - begun


def _interleaved(jobs: dict[tuple[str, int, int], Job], budget: float) -> dict[tuple[str, int, int], float]:
    """Seconds of every job: the mean of its faster half, since noise only adds.

    Forwards that cost over five plain steps are dropped: they can never pay. Those over `DEAR` of them, which seldom
    do, are measured once.
    """
    started, times = time.perf_counter(), {}
    for key, job in jobs.items():
        job()  # warm-up: compiles kernels, grows buffers
        times[key] = [job()]
        if key[0] == "rows" and times[key][0] > 5 * times["rows", 1, 0][0]:
            break
    limit = DEAR * times["rows", 1, 0][0]
    again = [key for key in times if key[0] != "rows" or times[key][0] <= limit]
    for _ in range(ROUNDS):
        if time.perf_counter() - started > budget:
            break
        for key in again:
            times[key].append(jobs[key]())
    return {key: float(np.mean(sorted(values)[: (len(values) + 1) // 2])) for key, values in times.items()}
