"""Which loss and which depth weights make the drafter that is accepted most: one pass over the same text for each.

DATA is the folder of a training run (with `data/` in it). Every variant starts from the same weights (of seed 0, or of
`--start-from`), sees the same batches, and is then measured on the same held-out answers:

- T = 0: the answers replayed through the drafter's own beam search (redrafter_mlx/train/replay.py);
- T = 1: what the formula for shared Gumbel noise predicts (redrafter_mlx/train/criteria.py) at the positions of these
  answers, depths taken as independent.

Run: python -m benchmarks.losses DATA OUT [VARIANT ...] [--positions N] [--start-from DRAFTER]. OUT gets a line of JSON
per variant (results.jsonl; one that is there is not run again), a table (table.md) and a plot (losses.png).
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.files import new_file
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.train.corpus import Corpus
from redrafter_mlx.train.criteria import shared_noise_acceptance, softmax
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.loss import Objective, depth_features, teacher_probs
from redrafter_mlx.train.replay import held_out
from redrafter_mlx.train.request import Shape
from redrafter_mlx.train.settings import Settings
from redrafter_mlx.train.trainer import Trainer
from redrafter_mlx.tree import Beam

HELD_OUT_TOKENS = 6_000
PREDICTED_POSITIONS = 2_000

VARIANTS = {
    "kl": Objective(),
    "kl, reach 1": Objective(reach=1.0),
    "kl, dpace": Objective(depth_weights="dpace"),
    "kl, half soft": Objective(soft=0.5),
    "tv": Objective(loss="tv"),
    "tv, dpace": Objective(loss="tv", depth_weights="dpace"),
    "lk": Objective(loss="lk"),
    "lk, dpace": Objective(loss="lk", depth_weights="dpace"),
    "gumbel": Objective(loss="gumbel"),
    "gumbel, dpace": Objective(loss="gumbel", depth_weights="dpace"),
}


def predicted(drafter: RecurrentDrafter, model: rd.Model, corpus: Corpus, depths: int) -> list[float]:
    """Mean acceptance of each depth at T = 1, by the formula, where the tokens before it are the text's."""
    rows = model.target.output_rows(drafter.target_ids()).astype(mx.float32)
    sums, counts = np.zeros(depths), np.zeros(depths)
    for batch in corpus.held_out(Settings().shape, PREDICTED_POSITIONS):
        size = batch.left.shape[1]
        probs = teacher_probs(batch.contexts[:, 1:], rows)
        for depth, features in enumerate(depth_features(drafter, batch, model.target.embed, depths)):
            guess = softmax(drafter.head(features).reshape(-1, rows.shape[0]))[0]
            teacher = probs[:, depth : depth + size].reshape(-1, rows.shape[0])
            accepted = shared_noise_acceptance(guess, teacher)[0].reshape(batch.left.shape)
            counted = (batch.left > depth).astype(mx.float32)
            sums[depth] += float((accepted * counted).sum())
            counts[depth] += float(counted.sum())
    return [round(float(value), 4) for value in sums / np.maximum(counts, 1)]


def start(model: rd.Model, corpus: Corpus, start_from: Path | None) -> RecurrentDrafter:
    """The weights that every variant starts from."""
    if start_from is None:
        shape = Shape(exit_dim=768, draft_vocab_size=6144)
        return new_drafter(shape.config(model.target), model.target, corpus, seed=0)
    drafter = load_recurrent(start_from, mx.float32)
    drafter.train()
    drafter.attach(model.target)
    drafter.freeze(keys=["d2t"], recurse=False)
    return drafter


def run(
    model: rd.Model, corpus: Corpus, out: Path, objective: Objective, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train one variant in the folder `out`, which is emptied; what came out."""
    shutil.rmtree(out, ignore_errors=True)
    drafter = start(model, corpus, arguments.start_from)
    settings = Settings(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        validate_every=1 << 30,
        validation_tokens=1,
        objective=objective,
    )
    trainer = Trainer(drafter, model.target, corpus, out, settings)
    begun = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - begun
    found = held_out(drafter, model.target.embed, corpus, Beam(1, objective.depths + 1), HELD_OUT_TOKENS)
    by_depth = predicted(drafter, model, corpus, objective.depths)
    shutil.rmtree(out)
    return {
        **asdict(objective),
        "positions": corpus.num_positions,
        "epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "start_from": None if arguments.start_from is None else arguments.start_from.name,
        "seconds": round(seconds),
        "steps": found.steps,
        "tokens_per_step": round(found.tokens_per_step, 4),
        "accepted_up_to_depth": [round(share, 4) for share in found.acceptance],
        "predicted_at_t1": round(1 + float(np.cumprod(by_depth).sum()), 4),
        "predicted_by_depth_at_t1": by_depth,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The results as Markdown, the best at T = 0 first."""
    lines = [
        "| loss | tokens per step, T = 0 | first guess accepted | tokens per step, T = 1, predicted | seconds |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda r: -r["tokens_per_step"]):
        first = r["accepted_up_to_depth"][0] if r["accepted_up_to_depth"] else 0.0
        lines.append(
            f"| {r['variant']} | {r['tokens_per_step']:.3f} | {first:.1%} | {r['predicted_at_t1']:.3f} | "
            f"{r['seconds']} |"
        )
    first = records[0]
    lines += [
        "",
        f"{first['positions']} positions, {first['epochs']} passes, {first['steps']} decode steps or so.",
    ]
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Tokens per step at both temperatures, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(records, key=lambda r: r["tokens_per_step"])
    places = np.arange(len(ordered))
    figure, axis = pyplot.subplots(figsize=(7, 1.5 + 0.4 * len(ordered)))
    axis.plot([r["tokens_per_step"] for r in ordered], places, "o", label="T = 0, replayed")
    axis.plot([r["predicted_at_t1"] for r in ordered], places, "s", label="T = 1, predicted")
    axis.set_yticks(places, [r["variant"] for r in ordered])
    axis.set_xlabel("tokens per step, one beam, held out")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", help=f"of: {'; '.join(VARIANTS)}. Default: all")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the target that wrote the text")
    parser.add_argument("--positions", type=int, default=40_000, help="of the text to train on")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--start-from", type=Path, help="drafter to start from instead of random weights")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        sys.exit(f"error: no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    data = arguments.data / "data"
    recipe = json.loads((data / "recipe.json").read_text())
    model = rd.load(arguments.model, drafter="none")
    model.target.watch(tuple(recipe["context_layers"]))
    corpus = Corpus([data], arguments.positions)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for name in arguments.variants or VARIANTS:
        if any(record["variant"] == name for record in records):
            continue
        found = run(model, corpus, arguments.out / "run", VARIANTS[name], arguments)
        records.append({"variant": name, **found, "machine": machine()["chip"]})
        with results.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(json.dumps(records[-1]), flush=True)
        with new_file(arguments.out / "table.md") as part:
            part.write_text(table(records))
        plot(records, arguments.out / "losses.png")


if __name__ == "__main__":
    main()
