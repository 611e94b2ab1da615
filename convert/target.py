"""Targets: a Hugging Face checkpoint or a GGUF as a folder that mlx-lm (and so redrafter) loads.

mlx-lm knows the architectures and does the work; what is added here is what it does not read:
PyTorch files (through the weights-only reader, one shard at a time), a drafter stored beside the
model, and GGUF files.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_config, save_model

from redrafter_mlx.files import read_json, read_safetensors
from redrafter_mlx.loading import default_model
from redrafter_mlx.loading.gguf import load_gguf

from .source import (
    Report,
    Tensor,
    as_array,
    check_output,
    dtype_name,
    dtype_of,
    locate,
    output_folder,
    shard_files,
)
from .torch_file import read_torch

# Copied as they are: a tokenizer that is not re-written cannot change.
_TEXT_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*",
    "merges.txt", "*.tiktoken", "generation_config.json", "*.py",
)  # fmt: skip


_DRAFTERS = ("drafter.", "medusa_head.")
"""What the names of a drafter's tensors begin with, in the checkpoint of its target: ModelOpt's and Medusa-2's."""

_DRAFTER_KEYS = ("redrafter", "medusa_num_heads", "medusa_num_layers")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """How to write a target. `bits` 0: not quantized anew."""

    bits: int = 0
    group_size: int = 64
    dequantize: bool = False
    dtype: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TargetSource:
    """A loaded target; `folder` holds its tokenizer files, or `tokenizer` is to be saved."""

    model: nn.Module
    config: dict[str, Any]
    folder: Path | None
    tokenizer: TokenizerWrapper | None = None


def convert_target(source: str, out: Path, options: TargetOptions, report: Report) -> None:
    """Write the model at `source` as an mlx-lm folder.

    Raises:
        FileNotFoundError, ValueError: not a model that mlx-lm knows, a damaged one, or options that
            do not fit it. `out` is left as it was.
    """
    check_output(out, options.force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.source.") as scratch:
        found = _open(source, Path(scratch), report)
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints progress
            model, config = _change(found, options, report)
        with output_folder(out, options.force) as part:
            save_model(part, model)
            save_config(config, part / "config.json")
            if found.tokenizer is not None:
                found.tokenizer.save_pretrained(part)
            elif found.folder is not None:
                _copy_text_files(found.folder, part)
            _check_reload(part, model, source)


def _open(source: str, scratch: Path, report: Report) -> TargetSource:
    path = default_model.default_model_path() if source == default_model.NAME else locate(source, "target")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"SRC must be a folder, a .gguf file or owner/name on Hugging Face, not the file {path}"
        )
    return _open_gguf(path) if path.is_file() else _open_folder(path, scratch, report)


def _open_gguf(path: Path) -> TargetSource:
    model, tokenizer, config = load_gguf(path)
    config = {name: value for name, value in config.items() if value is not None}
    config["eos_token_id"] = sorted(tokenizer.eos_token_ids)  # end of text and end of turn
    rope = model.layers[0].self_attn.rope
    if "rope_scaling" in config and hasattr(rope, "_freqs"):
        # The file stores each frequency's divisor; a config has one factor, the largest of them.
        dims = config["head_dim"]
        plain = config["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        config["rope_scaling"]["factor"] = round((rope._freqs / plain).max().item(), 4)
    packed = {
        name: {"group_size": module.group_size, "bits": module.bits}
        for name, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    if packed:
        bits = Counter(entry["bits"] for entry in packed.values()).most_common(1)[0][0]
        group_size = next(iter(packed.values()))["group_size"]
        others = {name: entry for name, entry in packed.items() if entry["bits"] != bits}
        config["quantization"] = {
            "group_size": group_size,
            "bits": bits,
            "mode": "affine",
            **others,
        }
    return TargetSource(model, config, None, tokenizer)


def _open_folder(folder: Path, scratch: Path, report: Report) -> TargetSource:
    read_json(folder / "config.json")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights or _holds_drafter(weights):
        _stage(folder, weights, scratch, report)
        weights = sorted(scratch.glob("model*.safetensors"))
    loadable = scratch if weights and weights[0].parent == scratch else folder
    try:
        model, config = load_model(loadable, lazy=True)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded as an mlx-lm model: {reason[:600]}") from None
    return TargetSource(model, config, folder)


def _holds_drafter(files: list[Path]) -> bool:
    """Also checks that no file is cut short: mlx-lm would not notice."""
    names = [name for file in files for name in read_safetensors(file)]
    return any(name.startswith(_DRAFTERS) for name in names)


def _stage(folder: Path, weights: list[Path], scratch: Path, report: Report) -> None:
    """Put into `scratch` what mlx-lm can load: configs, and safetensors without a drafter."""
    for file in folder.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, scratch / file.name)
    settings = scratch / "config.json"
    config = read_json(settings)
    config = {key: value for key, value in config.items() if key not in _DRAFTER_KEYS}
    settings.write_text(json.dumps(config))
    left_out = 0
    for number, (file, tensors) in enumerate(tensor_files(folder, weights)):
        arrays = {name: as_array(t) for name, t in tensors.items() if not name.startswith(_DRAFTERS)}
        left_out += len(tensors) - len(arrays)
        report(f"reading {file.name}")
        if arrays:
            mx.save_safetensors(str(scratch / f"model-{number:05d}.safetensors"), arrays)
    if left_out:
        report(f"{left_out} tensors of a drafter are left out; `redrafter-convert drafter` takes those")


def tensor_files(folder: Path, weights: list[Path]) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """The weight files with their tensors, one after the other."""
    if weights:
        for file in weights:
            yield file, dict(read_safetensors(file))
        return
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        _, files = shard_files(index)
    else:
        known = ("pytorch_model.bin", "model.pt", "model.bin", "model.pth")
        files = [folder / name for name in known if (folder / name).is_file()][:1]
    if not files:
        raise FileNotFoundError(
            f"no weights in {folder}: looked for model*.safetensors and pytorch_model*.bin"
        )
    for file in files:
        yield file, dict(read_torch(file))


def _change(found: TargetSource, options: TargetOptions, report: Report) -> tuple[nn.Module, dict[str, Any]]:
    """Dequantize, cast and quantize as asked."""
    model, config = found.model, dict(found.config)
    if "quantization" in config and (options.bits or options.dequantize):
        if options.bits:
            report("the source is quantized already: quantizing it again loses a little more")
        model = dequantize_model(model)
        config.pop("quantization")
        config.pop("quantization_config", None)
    if (dtype := dtype_of(options.dtype)) is not None:
        casts = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, array: mx.array) -> mx.array:
            return array.astype(dtype) if casts(name) and mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map_with_path(cast, model.parameters()))
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)
    if options.bits:
        model, config = quantize_model(model, config, options.group_size, options.bits)
        if not any(hasattr(module, "group_size") for module in model.modules()):
            raise ValueError(
                f"--group-size {options.group_size} fits no layer of this model: it must divide a "
                "layer's input size"
            )
    return model, config


def _copy_text_files(folder: Path, part: Path) -> None:
    for pattern in _TEXT_FILES:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, part / file.name)


def _check_reload(part: Path, model: nn.Module, source: str) -> None:
    """What was written must come back: all shapes (mlx-lm checks) and the RoPE frequencies."""
    again, _ = load_model(part, lazy=True)
    for (name, module), (_, other) in zip(_ropes(model), _ropes(again), strict=True):
        mine, theirs = getattr(module, "_freqs", None), getattr(other, "_freqs", None)
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or not mx.allclose(mine, theirs, rtol=1e-3).item():
            raise ValueError(f"{source} scales RoPE in a way that config.json cannot express ({name})")


def _ropes(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in model.named_modules() if name.endswith("rope")]
    return sorted(found, key=lambda pair: pair[0])
