"""Efficiency on a larger target: a random-weight Llama of 1.1 billion parameters, a drafter with scripted acceptance.

The draft costs what a real one costs (a random drafter of the default shape is searched in every step), but its tokens
are taken from the target's own text, each wrong with a given probability. So the question is only how much of the
tokens per step arrives as speed: efficiency = speed-up / tokens per step. Run: python -m benchmarks.scripted.
The last line is one JSON object. Needs about 6 GB.
"""

from __future__ import annotations

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.drafters.interface import Seen
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.policy import Fixed, Off
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.stats import Stats
from redrafter_mlx.target import Target
from redrafter_mlx.train.request import default_exit_dim
from redrafter_mlx.tree import MAX_NODES, Beam, Candidates

VOCAB = 32000
PROMPT = list(range(1, 65))


def large_target(layers: int) -> Target:
    """TinyLlama's sizes, random weights."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=2048, num_hidden_layers=layers, intermediate_size=5632,
            num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=VOCAB,
            max_position_embeddings=2048, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.eval()
    mx.eval(model.parameters())
    return Target(model, "random-llama", 2048)


class ScriptedDrafter(RecurrentDrafter):
    """Searches as ever, then offers the target's own tokens, known from a plain run, in place of what was found."""

    def follow(self, truth: mx.array, wrong: mx.array) -> None:
        """Take the script.

        Args:
            truth: (n,) int32, the whole text by absolute position.
            wrong: (n, L-1) bool, whether the guess at this depth from a root at this position misses.
        """
        self._script = (truth, wrong)

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        found = super().draft(seen, beam)
        truth, wrong = self._script
        assert seen.position is not None
        right = truth[seen.position + mx.arange(1, beam.length, dtype=mx.int32)]
        tokens = mx.where(wrong[seen.position][: beam.length - 1], (right + 1) % VOCAB, right)
        return replace(found, tokens=tokens + 0 * found.tokens)  # still waits for the search


def random_drafter(target: Target) -> ScriptedDrafter:
    size = target.hidden_size
    config = DrafterConfig(
        VOCAB, size, default_exit_dim(size), 2, head="factored", draft_vocab_size=6144,
    )  # fmt: skip
    drafter = ScriptedDrafter(config)
    mx.eval(drafter.parameters())
    drafter.eval()
    drafter.attach(target)
    return drafter


def timed(
    target: Target, drafter: ScriptedDrafter | None, beam: Beam | None, count: int
) -> tuple[list[int], float, Stats]:
    """Tokens after the prompt, the seconds of their decoding, and the figures."""
    cache = target.new_cache()
    cache.reserve(len(PROMPT) + count + MAX_NODES)
    policy = Off() if beam is None else Fixed(beam)
    text = Text(target, drafter, cache, policy, Sampling(), PROMPT, max_tokens=count + 1)
    tokens = [prefill(target, text, PROMPT)]
    begun = time.perf_counter()
    for gained in decode(target, text):
        tokens += gained
    return tokens, time.perf_counter() - begun, text.stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability that a guess is right")
    parser.add_argument("--drafts", nargs="+", default=["1x2", "1x3", "1x4", "1x5"])
    arguments = parser.parse_args()
    target = large_target(arguments.layers)
    drafter = random_drafter(target)

    plain, _, _ = timed(target, None, None, arguments.tokens + 16)
    truth = mx.array([*PROMPT, *plain, *[0] * 16], dtype=mx.int32)
    drafter.follow(truth, mx.array(np.random.default_rng(0).random((truth.size, 8)) > arguments.acceptance))
    seconds: dict[str, list[float]] = {name: [] for name in ("off", *arguments.drafts)}
    stats, identical = {}, True
    for run in range(arguments.runs + 1):
        for name in seconds:
            beam = None if name == "off" else Beam.parse(name)
            tokens, taken, stats[name] = timed(target, drafter, beam, arguments.tokens)
            identical &= tokens == plain[: len(tokens)]
            if run:
                seconds[name].append(taken / (len(tokens) - 1))
    result: dict[str, object] = {**machine(), "layers": arguments.layers, "identical": identical}
    base = statistics.median(seconds["off"])
    result["plain_tokens_per_second"] = round(1 / base, 3)
    for name in arguments.drafts:
        speedup = base / statistics.median(seconds[name])
        per_step = stats[name].tokens_per_step
        result[name] = {
            "speedup": round(speedup, 3),
            "tokens_per_step": round(per_step, 3),
            "efficiency": round(speedup / per_step, 3),
        }
        print(name, result[name], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
