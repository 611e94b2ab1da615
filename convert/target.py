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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from redrafter_mlx.files import check_finite, check_real, read_json, read_safetensors, write_safetensors
from redrafter_mlx.loading import default_model
from redrafter_mlx.loading.folder import WEIGHTS, load_tokenizer, map_model, read_config, with_ends
from redrafter_mlx.loading.gguf import find_gguf, load_gguf

from .source import (
    Report,
    as_array,
    check_output,
    dtype_name,
    dtype_of,
    locate,
    main_file,
    output_folder,
    shard_files,
    shortened,
)
from .torch_file import read_torch

# Copied as they are: a tokenizer that is not re-written cannot change.
_TEXT_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*",
    "merges.txt", "*.tiktoken", "generation_config.json",
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
    path = default_model.default_model_path() if source == default_model.NAME else locate(source, "target")
    with output_folder(out, options.force) as part:
        scratch = part / ".source"
        scratch.mkdir()
        found = _open(path, scratch, report)
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints progress
            model, config = _change(found, options, report)
        save_model(part, model)
        save_config(config, part / "config.json")
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(part)
        elif found.folder is not None:
            _copy_text_files(found.folder, part)
        if options.dtype is not None:
            _check_finite_files(sorted(part.glob(WEIGHTS)), f"{source} as {options.dtype}")
        _check_reload(part, model, source, report)
        shutil.rmtree(scratch)


def _open(path: Path, scratch: Path, report: Report) -> TargetSource:
    if (gguf := find_gguf(path)) is not None:
        return _open_gguf(gguf)
    if not path.is_dir():
        raise ValueError(f"SRC must be a folder, a GGUF or owner/name on Hugging Face, not the file {path}")
    return _open_folder(path, scratch, report)


def _open_gguf(path: Path) -> TargetSource:
    model, tokenizer, config = load_gguf(path)
    config = {name: value for name, value in config.items() if value is not None}
    config["eos_token_id"] = sorted(tokenizer.eos_token_ids)  # end of text and end of turn
    rope = model.layers[0].self_attn.rope
    if config.get("rope_scaling", {}).get("type") == "llama3":
        # The file stores each frequency's divisor; a config has one factor, the largest of them.
        dims = config["head_dim"]
        plain = config["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        config["rope_scaling"]["factor"] = round((rope._freqs / plain).max().item(), 4)
    packed = {
        name: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for name, module in model.named_modules()
        if "scales" in module
    }
    if packed:
        common = Counter(tuple(entry.items()) for entry in packed.values()).most_common(1)[0][0]
        others = {name: entry for name, entry in packed.items() if tuple(entry.items()) != common}
        config["quantization"] = {**dict(common), **others}
    return TargetSource(model, config, None, tokenizer)


def _open_folder(folder: Path, scratch: Path, report: Report) -> TargetSource:
    """Stage the folder in `scratch` as mlx-lm reads it, and map that."""
    config = read_json(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in _DRAFTER_KEYS}
    (scratch / "config.json").write_text(json.dumps(config))
    if (quantized := folder / "hf_quant_config.json").is_file():
        (scratch / quantized.name).write_text(json.dumps(read_json(quantized)))
    listed, files = _weight_files(folder)
    found: set[str] = set()
    for number, file in enumerate(files):
        report(f"reading {file.name}")
        found |= _stage(file, scratch / f"model-{number:05d}.safetensors")
    if absent := sorted(listed - found):
        raise ValueError(f"{folder}: its index names tensors that its shards lack: {shortened(absent)}")
    if drafters := sum(name.startswith(_DRAFTERS) for name in found):
        report(f"{drafters} tensors of a drafter are left out; `redrafter-convert drafter` takes those")
    try:
        model, config = map_model(scratch, read_config(scratch))
    except ValueError as error:
        raise ValueError(str(error).replace(str(scratch), str(folder))) from None
    return TargetSource(model, config, folder)


def _weight_files(folder: Path) -> tuple[set[str], list[Path]]:
    """The tensors that an index lists, none where there is no index; and the files of weights.

    Raises:
        FileNotFoundError, ValueError: there are none, or not all that the index names.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file() and (files := sorted(folder.glob(WEIGHTS))):
        return set(), files
    file = main_file(folder)
    if not file.name.endswith(".index.json"):
        return set(), [file]
    where, files = shard_files(file)
    return set(where), files


def _stage(file: Path, staged: Path) -> set[str]:
    """Put a file of weights to where mlx-lm reads it, as safetensors without a drafter. Returns its tensors' names.

    Raises:
        FileNotFoundError, ValueError: it is damaged, or holds values that are no numbers.
    """
    if file.suffix == ".safetensors":
        _check_finite_files([file], str(file))
        arrays = read_safetensors(file)
        if not any(name.startswith(_DRAFTERS) for name in arrays):
            staged.symlink_to(file.resolve())
            return set(arrays)
    else:
        arrays = {name: as_array(tensor) for name, tensor in read_torch(file).items()}
        check_finite(arrays, str(file))
    kept = {name: array for name, array in arrays.items() if not name.startswith(_DRAFTERS)}
    if kept:
        write_safetensors(staged, kept, {"format": "mlx"})
    return set(arrays)


def _check_finite_files(files: list[Path], where: str) -> None:
    """Check that all weights are numbers, with no more than one of them in memory.

    Raises:
        ValueError: one is not, or a file is damaged.
    """
    for file in files:
        arrays = read_safetensors(file)
        while arrays:
            check_finite(dict([arrays.popitem()]), where)


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
                check_real(file)
                shutil.copyfile(file, part / file.name)


def _check_reload(part: Path, model: nn.Module, source: str, report: Report) -> None:
    """What was written must come back: config, tokenizer, all shapes (mlx-lm checks) and the RoPE frequencies.

    Raises:
        ValueError: it does not.
    """
    try:
        again, config = map_model(part, read_config(part))
        with_ends(part, config)
        if load_tokenizer(part, config) is None:
            report("there is no tokenizer: prompts can be token ids only")
    except ValueError as error:
        raise ValueError(str(error).replace(str(part), source)) from None
    for (name, module), (_, other) in zip(_ropes(model), _ropes(again), strict=True):
        mine, theirs = getattr(module, "_freqs", None), getattr(other, "_freqs", None)
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or not mx.allclose(mine, theirs, rtol=1e-3).item():
            raise ValueError(f"{source} scales RoPE in a way that config.json cannot express ({name})")


def _ropes(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in model.named_modules() if name.endswith("rope")]
    return sorted(found, key=lambda pair: pair[0])
