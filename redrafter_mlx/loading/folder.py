"""A target out of a model folder: configs, weights and tokenizer files, each checked before a library reads it.

The libraries read a staged folder, in which every file that is used is a link to the real one: so no Python of the
folder is there to run, no name of a folder is taken for a pattern, and the config is the normalized one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from redrafter_mlx.device import on_gpu
from redrafter_mlx.files import check_real, check_safetensors, read_json, read_safetensors

from .config import check_token_ids, eos_token_ids, normalize_config
from .memory import check_fits

NOT_READ = {
    "awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "fbgemm_fp8": "FP8", "hqq": "HQQ", "aqlm": "AQLM",
    "eetq": "EETQ", "quanto": "Quanto", "higgs": "HIGGS", "vptq": "VPTQ", "spqr": "SpQR", "torchao": "TorchAO",
}  # fmt: skip
"""`quant_method` of a config -> its name, where neither mlx-lm nor this project reads the weights; of AWQ mlx-lm reads
those of 4 bits as AutoAWQ's "gemm" lays them out. It takes GPTQ's, which lie otherwise, for the same."""

INSTEAD = "take the model's original weights, or a version quantized by mlx-lm"
WEIGHTS = "model*.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_USED = (*_TOKENIZERS, "merges.txt", "vocab.txt")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_ENDINGS = (".json", ".txt", ".jinja")
_ENDINGS = (*_TEXT_ENDINGS, ".model", ".tiktoken")
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark


def load_folder(folder: Path) -> tuple[nn.Module, TokenizerWrapper | None, dict[str, Any]]:
    """Build (model, tokenizer, config) from an mlx-lm folder; the weights are mapped, not read yet.

    Raises:
        FileNotFoundError, ValueError: what is missing, damaged or not read, by its file.
    """
    config = read_config(folder)
    _check_memory(folder, config)
    model, config = map_model(folder, config)
    tokenizer = load_tokenizer(folder, config)
    return model, tokenizer, with_ends(folder, config)


def read_config(folder: Path) -> dict[str, Any]:
    """The normalized config of an mlx-lm folder, its weight files checked against it.

    Raises:
        FileNotFoundError, ValueError: what is missing, damaged or not read, by its file.
    """
    config = normalize_config(read_json(folder / "config.json"), str(folder / "config.json"))
    _check_weights(folder, config)
    return _with_head(folder, config)


def _with_head(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config, which says that the output head is not the embedding where the weights hold a head of its own.

    transformers leaves out of a config what is its class's default, and that is not always mlx-lm's, which would drop
    the head without a word.

    Raises:
        ValueError: the config says that they are one, and the weights that they are not.
    """
    tied = config.get("tie_word_embeddings")
    if tied is False:
        return config
    found: dict[str, mx.array] = {}
    for file in folder.glob(WEIGHTS):
        arrays = read_safetensors(file)
        found |= {
            name: arrays[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in arrays
        }
    if len(found) < 2:
        return config
    head, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
    is_one = (
        head.shape == embedding.shape
        and head.dtype == embedding.dtype
        and mx.array_equal(head, embedding).item()
    )
    if tied and not is_one:
        raise ValueError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, and lm_head.weight differs from "
            "model.embed_tokens.weight"
        )
    return config if is_one else {**config, "tie_word_embeddings": False}


def with_ends(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the tokens that end a text by the folder's `generation_config.json` too.

    Raises:
        ValueError: that file is damaged.
    """
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    settings = read_json(generation)
    check_token_ids(settings, str(generation))
    return {**config, "eos_token_id": sorted(eos_token_ids(config, settings))}


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Check the weight files before any of them is mapped.

    Raises:
        FileNotFoundError, ValueError: there are none, or one that is damaged or in a format that is not read.
    """
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        torch = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        if torch:
            raise FileNotFoundError(
                f"{folder} holds PyTorch weights ({torch[0]}) and no {WEIGHTS}: `redrafter-convert target "
                f"{folder} --out FOLDER` reads them"
            )
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}")
    num_tensors = sum(check_safetensors(file) for file in files)
    layers = config.get("num_hidden_layers", 0)
    if layers > num_tensors:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers is {layers}, and the weights are {num_tensors} tensors"
        )
    quantization = config.get("quantization_config")
    if "quantization" in config or not isinstance(quantization, dict):
        return
    method = quantization.get("quant_method")
    reads = method == "awq" and (quantization.get("bits"), quantization.get("version", "gemm")) == (4, "gemm")
    if isinstance(method, str) and method in NOT_READ and not reads:
        raise ValueError(f"{folder} holds {NOT_READ[method]} weights, which cannot be read: {INSTEAD}")


def _check_memory(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a quantized target that would not fit into memory dequantized, before its weights are read.

    Raises:
        ValueError: that is so.
    """
    quantization = config.get("quantization") or config.get("quantization_config")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if on_gpu() or not isinstance(bits, int) or bits < 1:
        return
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = stored * 32 / (bits + 0.5)  # half a bit for scales and biases
    check_fits(folder, needed)


def map_model(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model by mlx-lm, its weights mapped and not read yet; and the config as mlx-lm has completed it.

    Raises:
        ValueError: mlx-lm does not know such a model, or its weights do not fit the config.
    """
    with tempfile.TemporaryDirectory() as staged:
        for file in folder.glob(WEIGHTS):
            (Path(staged) / file.name).symlink_to(file.resolve())
        quantized = folder / "hf_quant_config.json"
        if quantized.is_file():
            (Path(staged) / quantized.name).write_text(json.dumps(read_json(quantized)))
        (Path(staged) / "config.json").write_text(json.dumps(config))
        try:
            return load_model(Path(staged), lazy=True, model_config=config)
        except Exception as error:  # a model's code may fail in any way on a config that is none of its own
            said = _first_words(error).replace(staged, str(folder))
            method = config.get("quantization_config")
            kind = method.get("quant_method") if isinstance(method, dict) else None
            if isinstance(kind, str):
                raise ValueError(
                    f"{folder} holds {NOT_READ.get(kind, kind.upper())[:40]} weights, which mlx-lm's "
                    f"{config['model_type']} does not read ({said}): {INSTEAD}"
                ) from None
            raise ValueError(f"{folder} cannot be loaded as an mlx-lm model: {said}") from None


def load_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper | None:
    """The folder's tokenizer, None where it has none; read beside the normalized config: transformers checks that too.

    Raises:
        ValueError: its files are damaged, by name where that can be said.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    kinds = {name: value for name, value in config.items() if name in ("model_type", "architectures")}
    with _staged_tokenizer(folder) as staged:
        (staged / "config.json").write_text(json.dumps(kinds))
        try:
            return tokenizer_utils.load(
                staged, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
            )
        except Exception as error:  # the tokenizers library raises plain Exceptions
            said = _first_words(error).replace(str(staged), str(folder))
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {said}") from None


@contextmanager
def _staged_tokenizer(folder: Path) -> Iterator[Path]:
    """A temporary folder of the tokenizer's files: links, or copies without a byte order mark.

    Raises:
        ValueError: one is a pointer of Git LFS, not UTF-8, or not the JSON object that it must be.
    """
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        for file in sorted(folder.iterdir()):
            if file.suffix not in _ENDINGS or file.name == "config.json" or not file.is_file():
                continue
            if file.name in (*_USED, *_OBJECTS) or file.suffix == ".jinja":
                check_real(file)
            if file.name in _OBJECTS:
                (staged / file.name).write_text(json.dumps(_settings(file)))
            elif (text := _without_mark(file)) is not None:
                (staged / file.name).write_bytes(text)
            else:
                (staged / file.name).symlink_to(file.resolve())
        yield staged


def _settings(file: Path) -> dict[str, Any]:
    """A JSON object of a tokenizer's settings; the limit of its texts, which transformers compares unchecked, a number.

    Raises:
        ValueError: it is not one.
    """
    settings = read_json(file)
    limit = settings.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float))):
        raise ValueError(f"{file}: model_max_length must be a number, not {str(limit)[:40]!r}")
    return settings


def _without_mark(file: Path) -> bytes | None:
    """A file of text without its leading byte order mark; None for what can be read as it is.

    Raises:
        ValueError: one of the tokenizer's files of text is not UTF-8.
    """
    if file.suffix not in _TEXT_ENDINGS:
        return None
    used = file.name in _USED or file.suffix == ".jinja"
    with file.open("rb") as opened:
        marked = opened.read(len(_MARK)) == _MARK
    if not used and not marked:
        return None
    data = file.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not used:
            return None
        raise ValueError(
            f"{file} is not UTF-8: byte {data[error.start]:#04x} at {error.start} begins no character"
        ) from None
    return data[len(_MARK) :] if marked else None


def _first_words(error: BaseException) -> str:
    """What an error of another library says, without the lists that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    used = 2 if lines and lines[0].endswith(":") else 1  # the first name of a list goes with its heading
    text = " ".join(lines[:used]) if lines else type(error).__name__
    more = f" (and {len(lines) - used} more lines)" if len(lines) > used else ""
    return (text if len(text) <= 300 else text[:297] + "...") + more
