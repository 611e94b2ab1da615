"""What a change of the trainer or of the drafter's shape brings: held-out acceptance after one pass over the same text.

DATA is the folder of a training run (with `data/` in it), whose text has the states of all its context layers. Every
variant trains on the first positions of it and is then decoded on held-out answers (redrafter_mlx/train/replay.py).
Run: python -m benchmarks.ablation DATA OUT [VARIANT ...]. A line of JSON per variant goes to OUT/results.jsonl; one
that is there is not run again.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from redrafter_mlx.files import new_file
from redrafter_mlx.train.corpus import Corpus
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.loss import Objective
from redrafter_mlx.train.replay import held_out
from redrafter_mlx.train.request import Shape
from redrafter_mlx.train.settings import Settings
from redrafter_mlx.train.trainer import Trainer
from redrafter_mlx.tree import Beam

HELD_OUT_TOKENS = 6_000


@dataclass(frozen=True, slots=True)
class Variant:
    """One run. The defaults are what everything is compared with."""

    positions: int = 40_000
    shape: Shape = Shape(exit_dim=768, draft_vocab_size=6144)
    objective: Objective = Objective()
    contexts: bool = True
    """False: the final hidden state only."""


BASE = Variant()
VARIANTS = {
    "base": BASE,
    "hard targets": replace(BASE, objective=Objective(soft=0.0)),
    "half soft": replace(BASE, objective=Objective(soft=0.5)),
    "reach 0.5": replace(BASE, objective=Objective(reach=0.5)),
    "reach 1": replace(BASE, objective=Objective(reach=1.0)),
    "decay 0.5": replace(BASE, objective=Objective(decay=0.5)),
    "final state only": replace(BASE, contexts=False),
    "vocabulary 12288": replace(BASE, shape=replace(BASE.shape, draft_vocab_size=12288)),
    "one residual block": replace(BASE, shape=replace(BASE.shape, num_draft_layers=1)),
    "no RNN": replace(BASE, shape=replace(BASE.shape, rnn=False)),
    **{f"exit_dim {n}": replace(BASE, shape=replace(BASE.shape, exit_dim=n)) for n in (256, 512, 1024)},
    **{f"{n} positions": replace(BASE, positions=n) for n in (10_000, 20_000, 80_000, 160_000)},
}


def run(model: rd.Model, data: Path, out: Path, variant: Variant) -> dict[str, object]:
    """Train one variant in the folder `out`, which is emptied; what came out."""
    shutil.rmtree(out, ignore_errors=True)
    corpus = Corpus([data], variant.positions)
    size = model.target.hidden_size
    layers = json.loads((data / "recipe.json").read_text())["context_layers"] if variant.contexts else ()
    model.target.watch(tuple(layers))
    if not variant.contexts:
        corpus.shards = [replace(shard, contexts=shard.contexts[:, :size]) for shard in corpus.shards]
        corpus.context_size = size
    settings = Settings(epochs=1, validate_every=1 << 30, validation_tokens=1, objective=variant.objective)
    drafter = new_drafter(variant.shape.config(model.target), model.target, corpus, seed=0)
    trainer = Trainer(drafter, model.target, corpus, out, settings)
    begun = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - begun
    found = held_out(drafter, model.target.embed, corpus, Beam(1, 5), HELD_OUT_TOKENS)
    shutil.rmtree(out)
    own = sum(a.size for _, a in tree_flatten(drafter.trainable_parameters()))  # type: ignore[str-unpack, union-attr]
    return {
        "positions": corpus.num_positions,
        "million_weights": round(own / 1e6, 2),
        "coverage": round(trainer.coverage, 4),
        "seconds": round(seconds),
        "steps": found.steps,
        "1x5": round(found.tokens_per_step, 4),
        "by_depth": [round(share, 4) for share in found.acceptance],
    }


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Held-out tokens per step by text trained on and by size of the drafter, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "positions of text, one pass": (
            "positions",
            lambda name: name == "base" or name.endswith(" positions"),
        ),
        "million weights, 40,000 positions": (
            "million_weights",
            lambda name: name == "base" or name.startswith("exit_dim "),
        ),
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 3.5), sharey=True)
    for axis, (label, (key, belongs)) in zip(axes, panels.items(), strict=True):
        points = sorted((r[key], r["1x5"]) for r in records if belongs(r["variant"]))
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set_xscale("log")
        axis.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per step, 1x5, held out")
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", help=f"of: {', '.join(VARIANTS)}; default all")
    parser.add_argument("--plot", type=Path, help="also draw the results so far to this PNG file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        sys.exit(f"error: no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {json.loads(line)["variant"] for line in lines}
    model = rd.load(drafter="none")
    for name in arguments.variants or VARIANTS:
        if name in done:
            continue
        record = {
            "variant": name,
            **run(model, arguments.data / "data", arguments.out / "run", VARIANTS[name]),
        }
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    if arguments.plot:
        plot([json.loads(line) for line in results.read_text().splitlines()], arguments.plot)


if __name__ == "__main__":
    main()
