"""What a source is, read from names, shapes and configs; no weights are loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig
from redrafter_mlx.drafters.speculator import SpeculatorConfig
from redrafter_mlx.files import read_json
from redrafter_mlx.loading.gguf import read_header

from .drafter import DrafterSource, read_drafter
from .names import translate
from .published import CONFIGS, Source, described, read_published
from .source import Tensor, dtype_name, locate, read_weights
from .speculator import is_ours


def describe(source: str) -> dict[str, str]:
    """Label -> text for a drafter, a target, both in one folder, or a GGUF.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be read.
    """
    path = locate(source, "checkpoint")
    if path.suffix == ".gguf":
        return _gguf(path)
    config = {}
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    if config.get("model_type") == MODEL_TYPE and "head" in config:
        return _ours(folder)
    kind = str(config.get("model_type"))
    if kind in CONFIGS and (kind != SpeculatorConfig.model_type or is_ours(config)):
        return _our_other(folder, CONFIGS[kind])
    if (found := read_published(path)) is not None:
        return _published(found)
    weights = read_weights(path)
    named = translate(sorted(weights.tensors))
    if not named.unknown:
        return _drafter(read_drafter(path))
    text = config.get("text_config", config)
    return {
        "kind": "target"
        if "model_type" in config
        else "unknown: no drafter's names, and no model_type in config.json",
        "files": weights.container,
        "model type": str(config.get("model_type")),
        "layers": str(text.get("num_hidden_layers")),
        "hidden size": str(text.get("hidden_size")),
        "vocabulary": str(text.get("vocab_size")),
        "quantization": json.dumps(config.get("quantization") or config.get("quantization_config")),
        "values": _count(weights.tensors.values()),
    }


def _count(tensors: Iterable[Tensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[dtype_name(tensor.dtype)] += tensor.size
    return ", ".join(f"{count:,} {kind}" for kind, count in sizes.most_common())


def _sizes(config: DrafterConfig) -> dict[str, str]:
    return {
        "hidden size": str(config.hidden_size),
        "exit_dim": str(config.exit_dim),
        "residual blocks": str(config.num_draft_layers),
        "vocabulary": str(config.vocab_size),
        "recurrent": "yes" if config.rnn else "no (sum of embeddings)",
    }


def _lines(
    described: dict[str, str],
    tensors: Iterable[Tensor],
    notes: Sequence[str] = (),
    unknown: Sequence[str] = (),
) -> dict[str, str]:
    """What is known of a drafter, how many values it has, and what the user should know about it."""
    lines = {**described, "values": _count(tensors)}
    lines |= {f"note {number}": note for number, note in enumerate(notes, 1)}
    return lines | ({"unknown keys": ", ".join(unknown)} if unknown else {})


def _drafter(found: DrafterSource) -> dict[str, str]:
    described = {
        "kind": "recurrent drafter",
        "names": found.named.dialect,
        "files": found.container,
        **_sizes(found.config),
    }
    return _lines(described, found.tensors.values(), notes=found.notes)


def _ours(folder: Path) -> dict[str, str]:
    where = folder / "config.json"
    config, unknown = DrafterConfig.from_dict(read_json(where), str(where))
    weights = read_weights(folder)
    described = {
        "kind": "recurrent drafter of redrafter-mlx; loads as it is",
        "files": weights.container,
        **_sizes(config),
        "head": config.head,
        "activation": config.activation,
        "drafted vocabulary": str(config.draft_vocab),
        "quantization": json.dumps(config.quantization),
        "made for": str(config.target.get("name", "not recorded")),
    }
    return _lines(described, weights.tensors.values(), unknown=unknown)


def _published(found: Source) -> dict[str, str]:
    described_as = {"kind": found.kind, "files": found.container, **described(found.values)}
    return _lines(described_as, found.tensors.values(), notes=found.notes)


def _our_other(folder: Path, made: Any) -> dict[str, str]:
    """A folder of ours that holds no recurrent drafter; `made` is its config's class."""
    where = folder / "config.json"
    config, unknown = made.from_dict(read_json(where), str(where))
    weights = read_weights(folder)
    described_as = {
        "kind": f"{_KINDS[made.model_type]} of redrafter-mlx; loads as it is",
        "files": weights.container,
        **described({each.name: getattr(config, each.name) for each in fields(config)}),
        "quantization": json.dumps(config.quantization),
    }
    return _lines(described_as, weights.tensors.values(), unknown=unknown)


_KINDS = {"mlp_speculator": "speculator", "medusa_heads": "Medusa heads", "hydra_heads": "Hydra heads"}


def _gguf(path: Path) -> dict[str, str]:
    header = read_header(path)
    kinds = Counter(kind for _, kind in header.tensors.values())
    architecture = str(header.metadata.get("general.architecture"))
    return {
        "kind": "target, GGUF",
        "name": str(header.metadata.get("general.name")),
        "model type": architecture,
        "layers": str(header.metadata.get(f"{architecture}.block_count")),
        "hidden size": str(header.metadata.get(f"{architecture}.embedding_length")),
        "tensors": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        "tokenizer": str(header.metadata.get("tokenizer.ggml.model")),
        "chat template": "yes" if "tokenizer.chat_template" in header.metadata else "no",
    }
