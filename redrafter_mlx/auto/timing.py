"""Measuring what a verified row and a draft cost: everything in turn, so that a slow moment hits all alike.

The machine is never quiet. What another program takes only adds to a time, so the fastest samples of each job count;
what is impossible (a row less costing more, on a CPU) is smoothed away; and nothing is left out, or measured less
often, because one sample was slow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Text, prefill, step
from redrafter_mlx.device import on_gpu
from redrafter_mlx.drafters.interface import Drafter, Seen
from redrafter_mlx.drafters.lookup import Lookup, Offer, TextLookup
from redrafter_mlx.files import read_json
from redrafter_mlx.policy import Fixed, Off, Policy
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from redrafter_mlx.tree import MAX_NODES, Beam, chain

from .table import CostTable, cache_path, keep_table

_log = logging.getLogger("redrafter_mlx")

Job = Callable[[], float]
"""Measures something; its seconds."""
Key = tuple[str, int, int]

# Where MLX's kernels change, and between: 5-row tiles, 6/10/12/13/14/15/18/25/32/33-row limits on
# Metal. A CPU is steeper, and slow enough that every size measured costs the others samples.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 16, 20, 24, 32, 33, 48, 64)
CPU_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
WIDTHS = (1, 2, 4, 8)
BUDGET_SECONDS = 6.0
CONTEXT = 128  # positions in the cache while measuring
ESSENTIAL_ROWS = 4  # always measured: drafts are compared with them
RARELY_PAYS, NEVER_PAYS = 2.5, 5.0  # plain steps: row counts above are timed seldom; above, not at all
SELDOM = 3  # samples of a row count that rarely pays: what is slow three times is not slow by chance
ROUNDS, LEAST_ROUNDS = 8, 4  # of all measurements; of them even past the budget
WAITING = Beam(1, 4, 4)  # what is looked up in the steps that show what waiting for the text costs
STEPS = 2  # decode steps in one measurement
RESTLESS, MOST_ATTEMPTS = (
    1.3,
    3,
)  # a table whose samples spread so much is measured again, so many times in all
FASTEST = 3  # of so many samples one, the fastest, counts


def cost_table(
    target: Target,
    drafter: Drafter | None,
    fresh: bool = False,
    on_measure: Callable[[], None] | None = None,
) -> CostTable:
    """The table for this machine, model and drafter: from the cache folder, or measured now (under 10 s).

    Args:
        fresh: measure, whatever the cache folder holds. A table that was measured while the machine was busy is
            measured again in any case, in up to two later processes.
        on_measure: called before a measurement; by default one line is logged.
    """
    path, kept = cache_path(target, drafter), None
    if not fresh:
        try:
            found = CostTable.from_dict(read_json(path))
            if bool(found.first_level) != (drafter is not None):
                raise ValueError("parts are missing")
            kept = found
            if kept.unrest < RESTLESS or kept.attempts >= MOST_ATTEMPTS:
                return kept
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            _log.warning("%s cannot be used (%s), measuring again", path, error)
    if on_measure is not None:
        on_measure()
    else:
        _log.warning("measuring what drafting costs on this machine, once (some seconds)")
    table = measure(target, drafter)
    if kept is not None:  # of a busy minute: the quieter of the two counts
        table = replace(min(table, kept, key=lambda each: each.unrest), attempts=kept.attempts + 1)
    keep_table(table, path)
    return table


def measure(target: Target, drafter: Drafter | None, budget: float | None = None) -> CostTable:
    """Measure within about `budget` seconds (6 by default).

    Isolated timings miss host overhead and overlap, so whole decode steps are timed too: plain ones give C(1), and
    the difference between drafted ones and their parts, the same for all widths, is added to `first_level`.
    """
    cache = target.new_cache()
    cache.reserve(CONTEXT + MAX_NODES)
    tokens = mx.arange(CONTEXT, dtype=mx.int32) % target.vocab_size
    context = target.extend(tokens, cache).contexts[0]
    mx.eval(context)

    def forward(rows: int) -> Job:
        return lambda: _seconds(lambda: mx.argmax(target.verify(chain(tokens[:rows]), cache).logits, axis=-1))

    def draft(width: int, length: int) -> Job:
        assert drafter is not None
        text = drafter.start([])
        seen, beam = Seen(context, mx.array(0, dtype=mx.int32), None), Beam(width, length, 2)

        def run() -> float:
            logprobs = text.draft(seen, beam).logprobs
            begun = time.perf_counter()
            mx.eval(logprobs)
            return time.perf_counter() - begun

        return run

    def steps(policy: Policy, drafter: Drafter | None = drafter, lookup: Lookup | None = None) -> Job:
        prompt: list[int] = tokens.tolist()  # type: ignore[assignment]
        text = Text(target, drafter, target.new_cache(), policy, Sampling(), prompt, lookup=lookup)
        prefill(target, text, prompt)
        return partial(_step_seconds, target, text)

    widths = [] if drafter is None else [w for w in WIDTHS if w <= target.widest(drafter.max_width)]
    long = 5 if drafter is None else min(5, drafter.max_length or 5)
    beams = [Beam(w, min(3, long), min(4, 1 + w * (min(3, long) - 1))) for w in widths]
    jobs: dict[Key, Job] = {("plain", 0, 0): steps(Off())}
    jobs["waiting", WAITING.nodes or 0, 0] = steps(Fixed(WAITING), None, _Repeating())
    jobs |= {("drafted", beam.width, 0): steps(Fixed(beam)) for beam in beams}
    jobs |= {("draft", w, length): draft(w, length) for w in widths for length in sorted({2, long})}
    jobs |= {("rows", rows, 0): forward(rows) for rows in (ROWS if on_gpu() else CPU_ROWS)}
    return _table(_interleaved(jobs, BUDGET_SECONDS if budget is None else budget), beams, long)


class _Repeating(Lookup):
    """Finds the same in every step."""

    def start(self, tokens: Sequence[int], greedy: bool = True) -> TextLookup:
        return _RepeatingText(tokens, self.rates[greedy])


class _RepeatingText(TextLookup):
    def offer(self, beam: Beam) -> Offer:
        super().offer(beam)  # takes its time too
        return Offer([0, 0, 0], [-1, 0, 1], [1.0, 1.0, 1.0], 3)


def _table(samples: dict[Key, list[float]], beams: Sequence[Beam], long: int) -> CostTable:
    """What was measured as a table: `beams` were drafted in whole steps, `long` is the length of the longer draft.

    Of every job the fastest third of its samples counts.
    """
    times, unrest = {key: _fastest(each) for key, each in samples.items()}, _unrest(samples)
    widths = [beam.width for beam in beams]
    verify = {rows: seconds for (kind, rows, _), seconds in times.items() if kind == "rows"}
    verify[1] = times["plain", 0, 0]
    if not on_gpu():
        verify = isotonic(verify)
    levels = max(1, long - 2)
    level = isotonic({w: max(0.0, times["draft", w, long] - times["draft", w, 2]) / levels for w in widths})
    alone = isotonic({w: times["draft", w, 2] for w in widths})
    waiting = times["waiting", WAITING.nodes or 0, 0] - verify[WAITING.nodes or 0]
    if not widths:
        return CostTable(verify, {}, {}, max(0.0, waiting), unrest)
    beyond = [
        times["drafted", b.width, 0] - verify[b.nodes or 0] - alone[b.width] - level[b.width] * (b.length - 2)
        for b in beams
    ]
    first = {w: alone[w] + float(np.median(beyond)) for w in widths}
    return CostTable(verify, first, level, max(0.0, waiting), unrest)


def isotonic(seconds: dict[int, float]) -> dict[int, float]:
    """Pool-adjacent-violators: the closest sequence that does not fall."""
    runs: list[list[float]] = []
    for value in seconds.values():
        runs.append([value])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    pooled = [float(np.mean(run)) for run in runs for _ in run]
    return dict(zip(seconds, pooled, strict=True))


def _step_seconds(target: Target, text: Text) -> float:
    """Seconds of one of the next decode steps."""
    mx.synchronize()  # another text's last step was launched ahead
    step(target, [text])  # has nothing launched ahead of it
    begun = time.perf_counter()
    for _ in range(STEPS):
        step(target, [text])
    return (time.perf_counter() - begun) / STEPS


def _seconds(build: Callable[[], mx.array]) -> float:
    begun = time.perf_counter()
    mx.eval(build())
    return time.perf_counter() - begun


def _fastest(samples: Sequence[float]) -> float:
    """The mean of the fastest third."""
    return float(np.mean(sorted(samples)[: max(1, len(samples) // FASTEST)]))


def _unrest(times: dict[Key, list[float]]) -> float:
    """How much slower than the fastest samples the middle ones were: 1 on a quiet machine."""
    return float(np.median([np.median(samples) / _fastest(samples) for samples in times.values()]))


def _interleaved(jobs: dict[Key, Job], budget: float) -> dict[Key, list[float]]:
    """Samples of the seconds of every job.

    Row counts above 2.5 plain steps rarely pay and are timed three times; above two that take over 5, none is timed.
    """
    started, times = time.perf_counter(), dict[Key, list[float]]()

    def costs_over(plain_steps: float, key: Key) -> bool:
        """True for a row count that a table can do without and that takes longer than so many plain steps."""
        is_optional = key[0] == "rows" and key[1] > ESSENTIAL_ROWS
        return is_optional and min(times[key]) > plain_steps * min(times["rows", 1, 0])

    hopeless: list[int] = []
    for key, job in jobs.items():
        if key[0] == "rows" and len(hopeless) == 2:
            continue
        job()  # warm-up: compiles kernels, grows buffers
        times[key] = [job()]
        while len(times[key]) < SELDOM and costs_over(NEVER_PAYS, key):
            times[key].append(job())
        if costs_over(NEVER_PAYS, key):
            hopeless.append(key[1])
    for index in range(ROUNDS):
        if index >= LEAST_ROUNDS and time.perf_counter() - started > budget:
            break
        for key, samples in times.items():
            if len(samples) < SELDOM or not costs_over(RARELY_PAYS, key):
                samples.append(jobs[key]())
    return times
