"""Models with recurrent layers: drafted texts are the plain ones over thousands of tokens, and what a replay costs.

One tiny model with random weights for every kind of recurrence (`families`), with drafts that are right 60 % of the
time. Then, for models of a realistic width and few layers, the seconds of running the accepted rows through the
recurrence again, as a share of the forward that verified them; and of a second forward over them, which is what that
saves.
Run: python -m benchmarks.hybrids [--tokens 5000] [--out FILE]. Exit 1 if a text differs; the last line is one JSON
object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.generation import Model
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.target import Target
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.tree import chain

from .families import SEQUENCE, build
from .often_right import OftenRight
from .ties import TIE, first_difference, gap

KINDS = {
    "qwen3_next": "gated delta net", "qwen3_5": "gated delta net", "kimi_linear": "Kimi delta attention",
    "olmo_hybrid": "gated delta net, three convolutions", "mamba": "Mamba", "jamba": "Mamba beside attention",
    "mamba2": "Mamba2", "nemotron_h": "Mamba2 beside attention and experts", "granitemoehybrid": "Mamba2 and experts",
    "falcon_h1": "Mamba2 and attention in one layer", "plamo2": "Mamba2 with normalized inputs",
    "bailing_hybrid": "lightning attention", "lfm2": "short convolution", "gear": "convolution of keys and values",
    "baichuan_m1": "convolution of keys and values in attention", "recurrent_gemma": "RG-LRU", "rwkv7": "RWKV-7",
    "longcat_flash_ngram": "n-grams of tokens",
}  # fmt: skip
TEXT = 250  # tokens of one text
DRAFTS = ("1x3", "1x4", "1x5", "1x6")
SETTINGS = (rd.Sampling(), rd.Sampling(temperature=0.8, seed=5))

_WIDE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000, "num_experts": 0,
}  # fmt: skip
WIDE = {
    "qwen3_5": {
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "num_local_experts": 0,
        "shared_intermediate_size": 6144,
    },
    "falcon_h1": {
        "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_ssm": 2048, "mamba_d_state": 256,
    },
    "jamba": {"mamba_d_state": 16, "mamba_expand": 2, "time_step_rank": 128},
    "lfm2": {"block_dim": 2048, "block_ff_dim": 6144, "block_multiple_of": 256},
    "rwkv7": {
        "head_dim": 64, "a_low_rank_dim": 96, "v_low_rank_dim": 64, "gate_low_rank_dim": 256,
        "decay_low_rank_dim": 96, "intermediate_size": 8192,
    },
}  # fmt: skip
"""Widths of models people run, four layers of each."""
ROWS = 4
SAMPLES = 12


def equality(family: str, count: int) -> dict[str, Any]:
    """Compare `count` drafted tokens or more with plain decoding."""
    target = Target(build(family), family, max_length=2048)
    target.check_tree()
    drafter = OftenRight(SEQUENCE)
    model = Model(target, drafter)
    rng = np.random.default_rng(0)
    compared = accepted = steps = rounds = 0
    different: list[str] = []
    ties: list[str] = []
    while compared < count:
        prompt: list[int] = rng.integers(1, SEQUENCE, int(rng.integers(2, 60))).tolist()
        sampling, draft = SETTINGS[rounds % 2], DRAFTS[rounds % len(DRAFTS)]
        plain = rd.generate(model, prompt, max_tokens=TEXT, sampling=sampling, draft="off")[1]
        drafter.follow([*prompt, *plain.token_ids], rounds)
        mine = rd.generate(model, prompt, max_tokens=TEXT, sampling=sampling, draft=draft)[1]
        compared, accepted, steps = compared + TEXT, accepted + mine.accepted_tokens, steps + mine.steps
        index = first_difference(mine.token_ids, plain.token_ids)
        if index is not None:
            text = [*prompt, *plain.token_ids[:index]]
            distance = gap(build(family), text, sampling, target.vocab_size)
            where = (
                f"{draft}, T = {sampling.temperature}, round {rounds}, token {index}: {distance:.1g} apart"
            )
            (ties if distance < TIE else different).append(where)
        rounds += 1
    return {"tokens": compared, "accepted": accepted, "steps": steps, "ties": ties, "different": different}


def replay_share(family: str) -> dict[str, float]:
    """Milliseconds of a forward of four rows, of a replay of one, two and three of them, and of a second forward over
    two, which a replay saves. Each is the mean of the fastest third of its samples: other programs only add time.
    """
    target = Target(build(family, changes={**_WIDE, **WIDE[family]}), family, max_length=2048)
    cache, other = target.new_cache(), target.new_cache()
    for each in (cache, other):
        mx.eval(target.extend(mx.arange(64, dtype=mx.int32), each).logits, each.arrays())
    samples: dict[str, list[float]] = {}

    def forward(rows: int, on: KVCache) -> float:
        tree = chain(mx.arange(rows, dtype=mx.int32))
        return _seconds(lambda: [target.verify(tree, on).logits, *on.arrays()])

    def replay(accepted: int) -> list[mx.array]:
        cache.keep(range(accepted))
        return cache.arrays()

    for _ in range(SAMPLES):
        for accepted in range(1, ROWS):
            samples.setdefault("forward", []).append(forward(ROWS, cache))
            samples.setdefault(f"replay {accepted}", []).append(_seconds(lambda: replay(accepted)))  # noqa: B023
        samples.setdefault("second forward", []).append(forward(2, other))
    fastest = {name: sorted(each)[: len(each) // 3] for name, each in samples.items()}
    times = {name: 1000 * statistics.mean(each) for name, each in fastest.items()}
    shares = [times[f"replay {accepted}"] / times["forward"] for accepted in range(1, ROWS)]
    return {**{f"{name}_ms": value for name, value in times.items()}, "replay_share": statistics.mean(shares)}


def _seconds(build: Callable[[], list[mx.array]]) -> float:
    begun = time.perf_counter()
    mx.eval(build())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=5000, help="of every family")
    parser.add_argument("--families", nargs="+", default=list(KINDS), metavar="NAME")
    parser.add_argument("--wide", nargs="*", default=list(WIDE), metavar="NAME", help="whose replay is timed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    equal: dict[str, Any] = {}
    for family in arguments.families:
        equal[family] = {"kind": KINDS.get(family, ""), **equality(family, arguments.tokens)}
        print(f"{family}: {equal[family]}", file=sys.stderr)
    costs: dict[str, Any] = {}
    for family in arguments.wide:
        costs[family] = replay_share(family)
        print(f"{family}: {costs[family]}", file=sys.stderr)
    different = sum(len(each["different"]) for each in equal.values())
    report = {**machine(), "equality": equal, "replay": costs, "different": different}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
