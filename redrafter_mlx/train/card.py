"""The drafter card: the README.md beside the weights."""

from __future__ import annotations

from typing import Any

from redrafter_mlx.drafters.recurrent import DrafterConfig


def card(config: DrafterConfig, record: dict[str, Any]) -> str:
    """Markdown naming target, shape, data and the last validation.

    Args:
        record: a line of metrics.jsonl.
    """
    training = config.training
    objective = training.get("objective", {})
    name = config.target.get("name", "unknown")
    shape = [
        "RNN" if config.rnn else "sum of embeddings",
        f"{config.num_draft_layers} residual blocks of {config.exit_dim}",
        f"{config.head} head over {config.draft_vocab} tokens",
        f"context layers {list(config.context_layers) or 'none'}",
    ]
    by_depth = ", ".join(f"{share:.3f}" for share in record["acceptance"])
    rows = {
        "target": f"{name}, hidden size {config.hidden_size}, {config.vocab_size} tokens",
        "shape": ", ".join(shape),
        "data": f"{training.get('positions')} positions of text the target wrote itself, "
        f"of which the head's vocabulary covers {training.get('vocabulary_coverage', 1):.1%}",
        "objective": f"{objective.get('depths')} tokens ahead, "
        f"soft targets {objective.get('soft')}, depth decay {objective.get('decay')}",
        "training": f"step {record['step']} of {record['steps']}, {training.get('epochs')} epochs, "
        f"AdamW, learning rate {training.get('learning_rate')}, seed {training.get('seed')}",
        f"held out, one beam of {objective.get('depths', 0) + 1} (root included)": (
            f"{record['tokens_per_step']:.3f} tokens per step over {record['held_out_steps']} "
            f"decode steps; accepted at least up to each depth: {by_depth}"
        ),
    }
    for number, run in enumerate(training.get("earlier", []), 1):
        rows[f"before that, run {number}"] = (
            f"{run['positions']} positions, {run['epochs']} epochs, learning rate {run['learning_rate']}"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""# Recurrent drafter for {name}

Made by `redrafter train`. Use it with `redrafter generate --model {name} --drafter <this folder>`.

| | |
|---|---|
{table}
"""
