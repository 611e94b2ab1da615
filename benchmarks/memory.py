"""Peak memory over a long generation: it must not grow, and drafting may add little more than the drafter itself.

One text is decoded plainly and drafted, end tokens ignored; the peak (MLX's own count) of every stretch of 500 tokens
is noted, and how many of the KV cache's buffers a stretch moved (none: they are written in place).
Run: python -m benchmarks.memory [--tokens 4000] [--drafts off 2x3@4 auto]. The last line is one JSON object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import sys

import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.generation import Model, encode, make_policy
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.tree import MAX_NODES

STRETCH = 500
PROMPT = "Tell me the whole history of the world, chapter by chapter, in as much detail as you can."


def addresses(cache: KVCache) -> list[int]:
    """Where the cache's buffers lie."""
    arrays = cache.arrays()
    mx.eval(arrays)
    return [np.array(array, copy=False).__array_interface__["data"][0] for array in arrays]


def peaks(model: Model, draft: str, count: int) -> dict[str, object]:
    """Of every stretch, the peak in bytes and the buffers moved."""
    prompt, cache = encode(model, PROMPT), model.target.new_cache()
    cache.reserve(len(prompt) + count + MAX_NODES)
    text = Text(model.target, model.drafter, cache, make_policy(model, draft), rd.Sampling(), prompt)
    prefill(model.target, text, prompt)
    peak: list[int] = []
    moved: list[int] = []
    done, before = 0, addresses(cache)
    mx.reset_peak_memory()
    for tokens in decode(model.target, text):
        done += len(tokens)
        if done < STRETCH * (len(peak) + 1):
            continue
        peak.append(mx.get_peak_memory())
        now = addresses(cache)
        moved.append(sum(a != b for a, b in zip(before, now, strict=True)))
        before = now
        mx.reset_peak_memory()
        if done >= count:
            break
    return {
        "peak_bytes": peak,
        "buffers_moved": moved,
        "tokens_per_step": round(text.stats.tokens_per_step, 3),
        "cache_bytes": cache.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--drafts", nargs="+", default=["off", "2x3@4", "auto"])
    arguments = parser.parse_args()
    model = rd.load()
    assert model.drafter is not None
    report: dict[str, object] = {**machine(), "tokens": arguments.tokens}
    report["drafter_bytes"] = model.drafter.nbytes
    for draft in arguments.drafts:
        report[draft] = found = peaks(model, draft, arguments.tokens)
        print(draft, found, file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
