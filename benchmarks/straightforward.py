"""Our decode step against a straightforward port of the algorithm, at equal width x length and equal weights.

The port does what Apple's MLX code does (recurrent_drafting.py, tree_attention.py): it verifies all W L rows, W copies
of the root among them, cuts the logits to the 50 largest by partitioning the vocabulary (which on Metal is a sort;
--sort sorts here too), and waits for the device after the draft, after the verification and after the acceptance. It is
written here for this comparison, with our KV cache and the same weights on both sides. It runs twice: on mlx-lm's model
and the drafter as MLX computes them, which is what a port would do, and on our own target and drafter, which on a CPU
compute few rows faster. A shape WxL@N gives our side its N rows.
Run: python -m benchmarks.straightforward --shapes 3x4 8x5@8. The last line is one JSON object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from redrafter_mlx import kernels
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.generation import Model, encode
from redrafter_mlx.measure.compare import MT_BENCH, Run, compare, own_arm, spread
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.prompts import read_requests
from redrafter_mlx.tree import Beam, TokenTree

KEPT = 50


def warp(logits: mx.array, sorts: bool) -> mx.array:
    """All but the 50 largest of every row set to -50000."""
    order = mx.argsort(-logits, axis=-1) if sorts else mx.argpartition(-logits, KEPT, axis=-1)
    index = order[..., :KEPT]
    out = mx.full(logits.shape, -50000.0)
    return mx.put_along_axis(out, index, mx.take_along_axis(logits, index, axis=-1), axis=-1)


def draft(model: Model, hidden: mx.array, root: int, beam: Beam, sorts: bool) -> mx.array:
    """Beams (W, L), the root in column 0."""
    drafter, width = model.drafter, beam.width
    assert isinstance(drafter, RecurrentDrafter)
    ids = drafter.target_ids()
    beams = mx.full((width, 1), root, dtype=mx.int32)
    total = mx.array([0.0] + [-50000.0] * (width - 1))
    state = drafter.next_state(None, model.target.embed(beams[:, 0]))
    prepared = mx.broadcast_to(
        drafter.prepare(hidden[None]), (width, drafter.prepare(hidden[None]).shape[-1])
    )
    for _ in range(beam.length - 1):
        logits = warp(drafter.head(drafter.features(prepared, state)), sorts)
        scores = (total[:, None] + logits - mx.logsumexp(logits, axis=-1, keepdims=True)).reshape(-1)
        best = mx.argpartition(-scores, width - 1)[:width]
        slot, token = best // logits.shape[1], (best % logits.shape[1]).astype(mx.int32)
        token = token if ids is None else ids[token]
        beams = mx.concatenate([beams[slot], token[:, None]], axis=1)
        total = scores[best]
        state = drafter.next_state(state[slot], model.target.embed(token))
    mx.eval(beams)
    return beams


@contextmanager
def mlx_alone() -> Iterator[None]:
    """MLX's own operations, without this project's faster ones for a CPU, for what is loaded and run meanwhile."""
    before = os.environ.get(kernels.SWITCH)
    os.environ[kernels.SWITCH] = "off"
    try:
        yield
    finally:
        os.environ.pop(kernels.SWITCH)
        if before is not None:
            os.environ[kernels.SWITCH] = before


def rows_of(beams: mx.array) -> TokenTree:
    """All W L tokens as a forest: every beam a chain of its own."""
    width, length = beams.shape
    rows = mx.arange(width * length, dtype=mx.int32)
    depth = rows % length
    mask = (rows[:, None] // length == rows // length) & (rows[:, None] >= rows)
    return TokenTree(beams.reshape(-1), mx.where(depth == 0, rows, rows - 1), depth, mask, length - 1)


def decode(model: Model, prompt: list[int], max_tokens: int, beam: Beam, sorts: bool) -> Run:
    cache = model.target.new_cache()
    cache.reserve(len(prompt) + max_tokens + 64)
    begun = time.perf_counter()
    out = model.target.extend(mx.array(prompt, dtype=mx.int32), cache)
    root, hidden = int(mx.argmax(out.logits[0])), out.contexts[0]
    mx.eval(hidden)
    started = time.perf_counter()
    tokens = [root]
    while len(tokens) < max_tokens:
        beams = draft(model, hidden, root, beam, sorts)
        verified = model.target.verify(rows_of(beams), cache)
        logits = warp(verified.logits, sorts)
        mx.eval(logits, verified.contexts)
        choice = mx.argmax(logits, axis=-1).reshape(beams.shape).astype(mx.int32)
        agrees = (beams[:, 1:] == choice[:, :-1]).astype(mx.int32)
        counts = mx.cumprod(agrees, axis=1).sum(axis=1)
        best = int(mx.argmax(counts))
        accepted = int(counts[best])
        rows = [best * beam.length + depth for depth in range(accepted + 1)]
        cache.keep(rows)
        root = int(choice[best, accepted])
        hidden = verified.contexts[rows[-1]]
        tokens += [*beams[best, 1 : accepted + 1].tolist(), root]  # type: ignore[misc]
        if model.tokenizer is not None and set(tokens[-accepted - 1 :]) & model.tokenizer.eos_token_ids:
            break
    return Run(tokens[:max_tokens], started - begun, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--shapes", nargs="+", default=["3x4", "4x4", "8x5"])
    parser.add_argument("--sort", action="store_true", help="the port sorts the vocabulary, as on Metal")
    arguments = parser.parse_args()
    model = rd.load()
    with mlx_alone():
        stock = rd.load()
    requests = spread(read_requests(MT_BENCH), arguments.limit)
    prompts = [encode(model, request.prompt) for request in requests]
    result: dict[str, object] = {
        **machine(),
        "prompts": len(prompts),
        "max_tokens": arguments.max_tokens,
        "port_sorts": arguments.sort,
    }
    for shape in arguments.shapes:
        beam = Beam.parse(shape)

        def port(prompt: list[int], beam: Beam = beam) -> Run:
            with mlx_alone():
                return decode(stock, prompt, arguments.max_tokens, beam, arguments.sort)

        def port_on_ours(prompt: list[int], beam: Beam = beam) -> Run:
            return decode(model, prompt, arguments.max_tokens, beam, arguments.sort)

        arms = {
            "port": port,
            "port on our target": port_on_ours,
            "ours": own_arm(model, shape, arguments.max_tokens, rd.Sampling()),
        }
        *_, compared = compare(arms, prompts, ["all"] * len(prompts))
        same = all(
            all(x == y for x, y in zip(a.token_ids, b.token_ids, strict=False))
            for name in ("port", "port on our target")
            for a, b in zip(compared.runs[name], compared.runs["ours"], strict=True)
        )
        result[shape] = {
            **{f"{name}, tokens/s": round(compared.rate(name)[1], 2) for name in arms},
            "ratio": round(compared.ratio("ours", "port")[1], 3),
            "ratio on our target": round(compared.ratio("ours", "port on our target")[1], 3),
            "identical": same,
        }
        print(shape, result[shape], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
