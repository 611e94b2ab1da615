"""Tokens per step of a drafter on MT-bench's first turns: exact, and greedy without running the target for each beam.

The target writes its greedy answers once (in batches), with the states it wrote them in; every beam is then replayed
(redrafter_mlx/train/replay.py). With a temperature, where the drafter shares the target's noise, every beam decodes.
Run: python -m benchmarks.acceptance [DRAFTER] [--max-tokens 256] [--beams 1x5 8x5@32] [--temperature 1 --limit 20].
The last line is one JSON object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from redrafter_mlx.files import new_file
from redrafter_mlx.generation import Model, encode
from redrafter_mlx.loading import default_model
from redrafter_mlx.measure.compare import MT_BENCH, spread
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.prompts import Request, read_requests
from redrafter_mlx.stats import Stats
from redrafter_mlx.train.generate import Answer, Row, generate_batch
from redrafter_mlx.train.replay import replayed
from redrafter_mlx.tree import Beam


def answers(model: Model, requests: list[Request], max_tokens: int) -> list[Answer]:
    """The target's greedy answers with their states, in batches of prompts of similar length."""
    assert model.tokenizer is not None
    prompts = [tuple(encode(model, request.prompt)) for request in requests]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    stop, out = frozenset(model.tokenizer.eos_token_ids), [Answer()] * len(prompts)
    for begin in range(0, len(order), 20):
        chosen = order[begin : begin + 20]
        rows = [Row(prompts[i], max_tokens, 0.0) for i in chosen]
        written = generate_batch(model.target, rows, stop, np.random.default_rng(0), cut_loops=False)
        for index, text in zip(chosen, written, strict=True):
            out[index] = text
        print(f"{begin + len(chosen)} of {len(order)} answers", file=sys.stderr)
    return out


def _texts(
    model: Model, requests: list[Request], max_tokens: int, keep: Path | None
) -> list[tuple[np.ndarray, list[int]]]:
    """Contexts (n, C) and tokens of every answer; from the file `keep`, where it is there."""
    if keep is not None and keep.is_file():
        with np.load(keep) as data:
            starts, contexts, tokens = data["starts"], data["contexts"], data["tokens"]
    else:
        written = answers(model, requests, max_tokens)
        starts = np.cumsum([0, *(len(text.tokens) for text in written)])
        contexts = np.stack([context for text in written for context in text.contexts])
        tokens = np.concatenate([text.tokens for text in written])
        if keep is not None:
            with new_file(keep) as part, part.open("wb") as file:
                np.savez(file, starts=starts, contexts=contexts, tokens=tokens)
    spans = zip(starts[:-1], starts[1:], strict=True)
    return [
        (contexts[a : min(b, a + max_tokens)], tokens[a : min(b, a + max_tokens)].tolist()) for a, b in spans
    ]


def decoded(
    model: Model, requests: list[Request], beam: str, max_tokens: int, temperature: float
) -> Iterator[Stats]:
    """Of every prompt, what decoding did; the prompt's number is its seed."""
    for seed, request in enumerate(requests):
        sampling = rd.Sampling(temperature=temperature, seed=seed)
        yield rd.generate(model, request.prompt, draft=beam, max_tokens=max_tokens, sampling=sampling)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", nargs="?", help="drafter folder; the shipped one by default")
    parser.add_argument("--model", default=None, help="target; the default model by default")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--beams", nargs="+", default=["1x5", "8x5@32"])
    parser.add_argument("--keep", type=Path, help="file (.npz) to keep the answers in, or to take them from")
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    model = rd.load(arguments.model or default_model.NAME, arguments.drafter)
    drafter = model.drafter
    if not isinstance(drafter, rd.RecurrentDrafter):
        sys.exit("error: the model has no recurrent drafter: name its folder")
    requests = spread(read_requests(MT_BENCH), arguments.limit)
    greedy, max_tokens = arguments.temperature == 0, arguments.max_tokens
    texts = _texts(model, requests, max_tokens, arguments.keep) if greedy else []
    result: dict[str, object] = {**machine(), "drafter": arguments.drafter or "shipped"}
    result |= {"max_tokens": max_tokens, "prompts": len(requests), "temperature": arguments.temperature}
    for name in arguments.beams:
        if greedy:
            beam = Beam.parse(name)
            found: Iterable[Stats] = (
                replayed(drafter, model.target.embed, contexts, tokens, beam) for contexts, tokens in texts
            )
        else:
            found = decoded(model, requests, name, max_tokens, arguments.temperature)
        total = Stats()
        categories: dict[str, Stats] = {}
        for request, stats in zip(requests, found, strict=True):
            total.add(stats)
            categories.setdefault(request.category, Stats()).add(stats)
        result[name] = round(total.tokens_per_step, 4)
        result[f"{name} by depth"] = [round(share, 4) for share in total.acceptance]
        result[f"{name} by category"] = {k: round(r.tokens_per_step, 3) for k, r in categories.items()}
        print(f"{name}: {total.tokens_per_step:.3f} tokens per step, {total.steps} steps", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
