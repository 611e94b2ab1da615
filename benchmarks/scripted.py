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

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from redrafter_mlx import measure
from redrafter_mlx.decode import Decoder, Draft
from redrafter_mlx.drafter import DrafterConfig, RecurrentDrafter
from redrafter_mlx.policy import Fixed, Off, Policy
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from redrafter_mlx.train.run import default_exit_dim
from redrafter_mlx.tree import Beam, Levels

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


def random_drafter(target: Target) -> RecurrentDrafter:
    size = target.hidden_size
    config = DrafterConfig(
        VOCAB, size, default_exit_dim(size), 2, head="factored", draft_vocab_size=6144,
    )  # fmt: skip
    drafter = RecurrentDrafter(config).bind(target).settle()
    mx.eval(drafter.parameters())
    return drafter


class ScriptedDecoder(Decoder):
    """Searches as ever, then puts the target's own tokens, known from a plain run, in place of what was found."""

    truth: mx.array
    """(n,) int32, the whole text by absolute position"""
    wrong: mx.array
    """(n, L-1) bool: whether the guess at this depth from a root at this position misses"""

    def _queue_draft(self, position: mx.array) -> None:
        super()._queue_draft(position)
        if self.draft is None:
            return
        levels = self.draft.levels
        ahead = position + mx.arange(1, levels.length, dtype=mx.int32)
        right = mx.where(self.wrong[position], (self.truth[ahead] + 1) % VOCAB, self.truth[ahead])
        tokens = right[:, None] + 0 * levels.tokens  # still waits for the search
        self.draft = Draft(self.draft.beam, Levels(tokens, levels.slots, levels.logprobs), None, None)


def timed(decoder: Decoder, count: int) -> tuple[list[int], float]:
    """Tokens after the prompt and the seconds of their decoding."""
    decoder.cache.reserve(len(PROMPT) + count + 64)
    decoder.wanted = count
    tokens = [decoder.prefill(PROMPT)]
    begun = time.perf_counter()
    for step in decoder.steps():
        tokens += step
    return tokens, time.perf_counter() - begun


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

    def decoder(kind: type[Decoder], policy: Policy) -> Decoder:
        return kind(target, drafter, target.new_cache(), policy, Sampling())

    plain, _ = timed(decoder(Decoder, Off()), arguments.tokens + 16)
    truth = mx.array([*PROMPT, *plain, *[0] * 16], dtype=mx.int32)
    miss = np.random.default_rng(0).random((truth.size, 8)) > arguments.acceptance
    seconds: dict[str, list[float]] = {name: [] for name in ("off", *arguments.drafts)}
    stats, identical = {}, True
    for run in range(arguments.runs + 1):
        for name in seconds:
            if name == "off":
                tokens, taken = timed(decoder(Decoder, Off()), arguments.tokens)
            else:
                beam = Beam.parse(name)
                own = decoder(ScriptedDecoder, Fixed(beam))
                assert isinstance(own, ScriptedDecoder)
                own.truth, own.wrong = truth, mx.array(miss[:, : beam.length - 1])
                tokens, taken = timed(own, arguments.tokens)
                stats[name] = own.stats
            identical &= tokens[: arguments.tokens + 1] == plain[: arguments.tokens + 1]
            if run:
                seconds[name].append(taken / (len(tokens) - 1))
    result: dict[str, object] = {**measure.machine(), "layers": arguments.layers, "identical": identical}
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
