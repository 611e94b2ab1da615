"""What a source is, read from names, shapes and configs; no weights are loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig
from redrafter_mlx.drafters.speculator import SpeculatorConfig
from redrafter_mlx.files import read_json
from redrafter_mlx.loading.config import normalize_config
from redrafter_mlx.loading.gguf import find_gguf, read_header

from .drafter import DrafterSource, read_drafter
from .names import translate
from .source import Tensor, dtype_name, locate, read_weights
from .speculator import SpeculatorSource, is_ours, is_speculator, read_speculator
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
    if is_ours(config):
        return _our_speculator(folder)
    if is_speculator(path):
        return _speculator(read_speculator(path))
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


def _cost(config: DrafterConfig | SpeculatorConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which targets it fits, and the bytes that a draft reads; of an embedding it reads a row."""
    looked_up = "emb" if isinstance(config, SpeculatorConfig) else "d2t"
    level = _bytes({name: tensor for name, tensor in tensors.items() if looked_up not in name})
    if isinstance(config, SpeculatorConfig):
        level //= config.n_predict if not config.tie_weights else 1
    elif config.head == "factored":
        rows = f" and {config.draft_vocab:,} of the target's {config.vocab_size:,} output rows"
        return _fits(config) | {"a drafted level reads": megabytes(level) + rows}
    return _fits(config) | {"a drafted level reads": megabytes(level)}


def _fits(config: DrafterConfig | SpeculatorConfig) -> dict[str, str]:
    made_for = config.target.get("name")
    sizes = f"targets of hidden size {config.hidden_size} and vocabulary {config.vocab_size}"
    return {_FITS: f"{sizes}; made for {made_for}" if made_for else f"{sizes}; for which one is not recorded"}


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
    config: DrafterConfig | SpeculatorConfig,
    tensors: Mapping[str, Tensor],
    notes: Sequence[str] = (),
    unknown: Sequence[str] = (),
) -> dict[str, str]:
    """What is known of a drafter, how many values it has, and what the user should know about it."""
    lines = {**described, **_cost(config, tensors), "values": _count(tensors.values())}
    lines |= {f"note {number}": note for number, note in enumerate(notes, 1)}
    return lines | ({"unknown keys": ", ".join(unknown)} if unknown else {})


def _drafter(found: DrafterSource) -> dict[str, str]:
    described = {
        "kind": "recurrent drafter",
        "names": found.named.dialect,
        "files": found.container,
        **_sizes(found.config),
    }
    return _lines(described, found.config, found.tensors, notes=found.notes)


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
    return _lines(described, config, weights.tensors, unknown=unknown)


def _speculator_sizes(config: SpeculatorConfig) -> dict[str, str]:
    return {
        "hidden size": str(config.hidden_size),
        "inner size": str(config.inner_size),
        "vocabulary": str(config.vocab_size),
        "method": config.method,
        "drafts": f"up to {config.n_predict} tokens: beam length {config.n_predict + 1}, the root counted",
        "stages share weights": "yes" if config.tie_weights else "no",
        "normalizes its input": "yes" if config.scale_input else "no",
    }


def _speculator(found: SpeculatorSource) -> dict[str, str]:
    described = {"kind": found.kind, "files": found.container, **_speculator_sizes(found.config)}
    return _lines(described, found.config, found.tensors, notes=found.notes)


def _our_speculator(folder: Path) -> dict[str, str]:
    where = folder / "config.json"
    config, unknown = SpeculatorConfig.from_dict(read_json(where), str(where))
    weights = read_weights(folder)
    described = {
        "kind": "speculator of redrafter-mlx; loads as it is",
        "files": weights.container,
        **_speculator_sizes(config),
        "quantization": json.dumps(config.quantization),
    }
    return _lines(described, config, weights.tensors, unknown=unknown)


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
