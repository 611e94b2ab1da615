"""The drafter card: the README.md beside the weights."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from redrafter_mlx.drafters.recurrent import DrafterConfig

QUESTION = "Why is the sky blue?"


def model_argument(model: str) -> str:
    """What `--model` takes from anywhere: a local file or folder by its whole path, anything else as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def command(model: str, drafter: str) -> str:
    """The command line that uses a drafter.

    Args:
        model: see `model_argument`.
        drafter: its folder, or its id on Hugging Face.
    """
    words = ["redrafter", "generate", "--model", model, "--drafter", drafter, QUESTION]
    return shlex.join(words)


def card(config: DrafterConfig, model: str, drafter: str) -> str:
    """Markdown naming target, shape, data and the last validation.

    Args:
        config: of a drafter that a `Trainer` saved.
        model, drafter: see `command`.
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
    rows = {
        "target": f"{name}, hidden size {config.hidden_size}, {config.vocab_size} tokens",
        "shape": ", ".join(shape),
        "weights": _weights(config),
        "data": f"{training.get('positions')} positions of text the target wrote itself, "
        f"of which the head's vocabulary covers {training.get('vocabulary_coverage', 1):.1%}",
        "objective": _objective(objective),
        "training": f"step {training.get('step')} of {training.get('steps')}, {training.get('epochs')} epochs, "
        f"AdamW, learning rate {training.get('learning_rate')}, seed {training.get('seed')}",
        f"held out, one beam of {objective.get('depths', 0) + 1} (root included)": _held_out(training),
        "license": "that of the target, whose output rows it uses and whose text it was trained on",
    }
    for number, run in enumerate(training.get("earlier", []), 1):
        rows[f"before that, run {number}"] = (
            f"{run['positions']} positions, {run['epochs']} epochs, learning rate {run['learning_rate']}"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""# Recurrent drafter for {name}

Made by `redrafter train`. Use it with

```sh
{command(model, drafter)}
```

| | |
|---|---|
{table}
"""


def hub_card(config: DrafterConfig, model: str, repo: str) -> str:
    """The card for Hugging Face: with the fields by which the hub finds it.

    Args:
        model: see `model_argument`; the id of a repository becomes the base model.
        repo: owner/name of the drafter.
    """
    fields = ["library_name: mlx", "tags: [redrafter-mlx, speculative-decoding, drafter]"]
    if is_repository(model):
        fields.append(f"base_model: {model}")
    return "---\n" + "\n".join(fields) + "\n---\n\n" + card(config, model, repo)


def index_line(model: str, repo: str, revision: str) -> str:
    """The entry of `assets/drafters/index.json` that lets `load` find a published drafter by its target."""
    name = model if is_repository(model) else Path(model).name
    return f"{json.dumps(name)}: {json.dumps({'repo': repo, 'revision': revision})}"


def is_repository(model: str) -> bool:
    """True for `owner/name`, as `--model` takes it."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None


def _weights(config: DrafterConfig) -> str:
    if config.quantization:
        return f"quantized to {config.quantization['bits']} bits in groups of {config.quantization['group_size']}"
    return "float16" if config.calibration else "float32, as trained: the folder float16 is the one to use"


def _objective(objective: dict[str, Any]) -> str:
    words = [f"{objective.get('depths')} tokens ahead"]
    loss = objective.get("loss", "kl")
    words.append(f"soft targets {objective.get('soft')}" if loss == "kl" else f"loss {loss}")
    if objective.get("depth_weights", "decay") == "decay":
        words.append(f"depth decay {objective.get('decay')}")
        words += [f"reach {objective['reach']}"] if objective.get("reach") else []
    else:
        words.append(f"depth weights {objective['depth_weights']}")
    return ", ".join(words)


def _held_out(training: dict[str, Any]) -> str:
    by_depth = ", ".join(f"{share:.3f}" for share in training.get("acceptance", []))
    return (
        f"{training.get('held_out_tokens_per_step', 0):.3f} tokens per step over {training.get('held_out_steps')} "
        f"decode steps; accepted at least up to each depth: {by_depth or 'not measured'}"
    )
