"""What a source is, read from names, shapes and configs; no weights are loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig
from redrafter_mlx.drafters.speculator import SpeculatorConfig
from redrafter_mlx.files import read_json
from redrafter_mlx.loading.config import normalize_config
from redrafter_mlx.loading.gguf import find_gguf, read_header

from .drafter import DrafterSource, read_drafter
from .names import translate
from .published import CONFIGS, Source, described, read_published
from .source import Tensor, dtype_name, locate, read_weights
from .speculator import is_ours
from .verify import costs, megabytes

_FITS = "fits"


def describe(source: str, target: str | None = None) -> dict[str, str]:
    """Label -> text for a drafter, a target, both in one folder, or a GGUF.

    Args:
        target: model whose drafter this is, to measure on this machine what drafting costs.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be read; a target for what is no drafter.
    """
    path = locate(source, "checkpoint")
    lines = _described(path)
    if target is None:
        return lines
    if _FITS not in lines:
        raise ValueError(f"--target {target} is for drafters, and {source} is a {lines['kind']}")
    return lines | costs(source, target)


def _described(path: Path) -> dict[str, str]:
    if (gguf := find_gguf(path)) is not None:
        return _gguf(gguf)
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
    if "model_type" in config:
        config = normalize_config(config, str(folder / "config.json"))
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ValueError(f"{folder / 'config.json'}: text_config must be an object, not {str(text)[:40]!r}")
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
        "weights": megabytes(_bytes(weights.tensors)),
    }


def _count(tensors: Iterable[Tensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[dtype_name(tensor.dtype)] += tensor.size
    return ", ".join(f"{count:,} {kind}" for kind, count in sizes.most_common())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.size * tensor.dtype.size for tensor in tensors.values())


def _cost(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which targets it fits, and the bytes that a drafted level reads; of an embedding it reads a row.

    Args:
        values: what is known of its config, under our names.
    """
    made_for = (values.get("target") or {}).get("name")
    sizes = f"targets of hidden size {values.get('hidden_size')} and vocabulary {values.get('vocab_size')}"
    fits = {_FITS: f"{sizes}; made for {made_for}" if made_for else f"{sizes}; for which one is not recorded"}
    levels = 1 if values.get("tie_weights") else values.get("n_predict") or values.get("num_heads") or 1
    looked_up = "emb" if "n_predict" in values else "d2t"
    level = _bytes({name: tensor for name, tensor in tensors.items() if looked_up not in name}) // levels
    if values.get("head") == "factored":
        rows = f" and {values['draft_vocab']:,} of the target's {values['vocab_size']:,} output rows"
        return fits | {"a drafted level reads": megabytes(level) + rows}
    return fits | {"a drafted level reads": megabytes(level)}


def _values(config: Any) -> dict[str, Any]:
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return values | ({"draft_vocab": config.draft_vocab} if isinstance(config, DrafterConfig) else {})


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
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    notes: Sequence[str] = (),
    unknown: Sequence[str] = (),
) -> dict[str, str]:
    """What is known of a drafter, how many values it has, and what the user should know about it."""
    lines = {**described, **_cost(values, tensors), "values": _count(tensors.values())}
    lines |= {f"note {number}": note for number, note in enumerate(notes, 1)}
    return lines | ({"unknown keys": ", ".join(unknown)} if unknown else {})


def _drafter(found: DrafterSource) -> dict[str, str]:
    described = {
        "kind": "recurrent drafter",
        "names": found.named.dialect,
        "files": found.container,
        **_sizes(found.config),
    }
    return _lines(described, _values(found.config), found.tensors, notes=found.notes)


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
    }
    return _lines(described, _values(config), weights.tensors, unknown=unknown)


def _published(found: Source) -> dict[str, str]:
    described_as = {"kind": found.kind, "files": found.container, **described(found.values)}
    return _lines(described_as, found.values, found.tensors, notes=found.notes)


def _our_other(folder: Path, made: Any) -> dict[str, str]:
    """A folder of ours that holds no recurrent drafter; `made` is its config's class."""
    where = folder / "config.json"
    config, unknown = made.from_dict(read_json(where), str(where))
    weights = read_weights(folder)
    described_as = {
        "kind": f"{_KINDS[made.model_type]} of redrafter-mlx; loads as it is",
        "files": weights.container,
        **described(_values(config)),
        "quantization": json.dumps(config.quantization),
    }
    return _lines(described_as, _values(config), weights.tensors, unknown=unknown)


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
