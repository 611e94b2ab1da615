"""How many bits a drafter's weights need here.

A search reads the drafter once per level, and on a GPU that is what it waits for. So there a drafter stored in full
precision is held in 8 or 4 bits where that makes its search faster. What is accepted hardly changes (on MT-bench's
text, 16 prompts of 96 tokens, the drafter of SmolLM2-135M brings 2.177 tokens per step at 4x4@8 as stored, 2.184 in 8
bits, 2.162 in 4), what is emitted not at all. On a CPU quantised products are slow, and nothing is tried.
"""

from __future__ import annotations

import logging
import statistics
import time

import mlx.core as mx

from .device import on_gpu
from .drafter import RecurrentDrafter, quantize_drafter, with_config
from .search import search
from .target import Target
from .weights import named

_log = logging.getLogger("redrafter_mlx")

BITS = (8, 4)
GROUP_SIZE = 64
GAIN = 0.95  # of the seconds with more bits, at most, for fewer bits to be taken
ROUNDS = 7


def lightest(drafter: RecurrentDrafter, target: Target) -> RecurrentDrafter:
    """The drafter, or on a GPU a copy of it in fewer bits where that is faster; both bound to `target`."""
    if not on_gpu() or drafter.config.quantization:
        return drafter
    choices = {0: drafter} | {bits: _quantised(drafter, target, bits) for bits in BITS}
    seconds = _search_seconds(choices, target)
    best = 0
    for bits in BITS:
        if seconds[bits] < GAIN * seconds[best]:
            best = bits
    if best:
        _log.info(
            "drafter held in %d bits: %.2f ms a search, %.2f as stored",
            best,
            1000 * seconds[best],
            1000 * seconds[0],
        )
    return choices[best]


def _quantised(drafter: RecurrentDrafter, target: Target, bits: int) -> RecurrentDrafter:
    copy = RecurrentDrafter(drafter.config)
    copy.load_weights(list(named(drafter).items()))
    quantize_drafter(copy, bits, GROUP_SIZE)
    copy.eval()
    return with_config(copy, quantization={"bits": bits, "group_size": GROUP_SIZE}).bind(target)


def _search_seconds(choices: dict[int, RecurrentDrafter], target: Target) -> dict[int, float]:
    """Median seconds of a search by each, in turn."""
    times: dict[int, list[float]] = {bits: [] for bits in choices}
    for _ in range(1 + ROUNDS):
        for bits, drafter in choices.items():
            context = mx.zeros((drafter.config.context_size,), dtype=target.dtype)
            begun = time.perf_counter()
            width = min(4, drafter.config.draft_vocab)
            mx.eval(search(drafter, context, mx.array(0), target.embed, width=width, length=4).logprobs)
            times[bits].append(time.perf_counter() - begun)
    return {bits: statistics.median(seconds[1:]) for bits, seconds in times.items()}  # the first one compiles
