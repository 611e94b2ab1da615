"""The precision of a drafter's search: on a GPU 8 or 4 bits, if that makes the search faster.

A search reads the drafter's weights once per level, and on a GPU this takes most of its time. Fewer bits hardly change
how many tokens are accepted: on MT-bench's text, 16 prompts of 96 tokens, the drafter of SmolLM2-135M gives 2.177
tokens per step at 4x4@8 as stored, 2.184 in 8 bits and 2.162 in 4. They never change the text. On a CPU, where
quantized multiplication is slow, the drafter stays as it is.
"""

from __future__ import annotations

import logging
import statistics
import time

import mlx.core as mx

from redrafter_mlx.device import on_gpu
from redrafter_mlx.tree import Beam

from .beam import search
from .interface import Seen, TargetView
from .quantization import quantize
from .recurrent import RecurrentDrafter, changed

_log = logging.getLogger("redrafter_mlx")

BITS = (8, 4)
GROUP_SIZE = 64
GAIN = 0.95  # fewer bits are chosen if they take at most this share of the seconds
ROUNDS = 7


def choose_precision(drafter: RecurrentDrafter, target: TargetView) -> None:
    """On a GPU, let an attached drafter search with a copy of itself in 8 or 4 bits if that is faster.

    Its own weights, which `save_drafter` writes, stay as they are.
    """
    if not on_gpu() or drafter.config.quantization:
        return
    choices = {0: drafter} | {bits: _rounded(drafter, target, bits) for bits in BITS}
    seconds = _search_seconds(choices, target)
    best = 0
    for bits in BITS:
        if seconds[bits] < GAIN * seconds[best]:
            best = bits
    if best:
        _log.info(
            "the drafter searches in %d bits: %.2f ms, as stored %.2f ms",
            best,
            1000 * seconds[best],
            1000 * seconds[0],
        )
        drafter.search_with(choices[best])


def _rounded(drafter: RecurrentDrafter, target: TargetView, bits: int) -> RecurrentDrafter:
    quantization = {"bits": bits, "group_size": GROUP_SIZE}
    copy = drafter.unattached()
    quantize(copy, quantization)
    copy.config = changed(drafter.config, quantization=quantization)
    copy.eval()
    copy.attach(target)
    return copy


def _search_seconds(choices: dict[int, RecurrentDrafter], target: TargetView) -> dict[int, float]:
    """Median seconds of a search by each of `choices`, timed in turn."""
    times: dict[int, list[float]] = {bits: [] for bits in choices}
    for _ in range(1 + ROUNDS):
        for bits, drafter in choices.items():
            context = mx.zeros((drafter.config.context_size,), dtype=target.dtype)
            beam = Beam(min(4, drafter.max_width), 4)
            begun = time.perf_counter()
            mx.eval(search(drafter.recurrence(), Seen(context, mx.array(0), None), beam).logprobs)
            times[bits].append(time.perf_counter() - begun)
    return {bits: statistics.median(seconds[1:]) for bits, seconds in times.items()}  # the first one compiles
