"""`load`: a target, its drafter and its tokenizer, from wherever they are.

A target is the name of the default model, a `.gguf` file, an mlx-lm folder, or a Hugging Face id. On the
CPU a quantized target is dequantized to float32: its quantized matmul costs linearly per row there, so
drafting could never pay.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import dequantize_model, load_model

from redrafter_mlx.device import memory_bytes, on_gpu
from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.drafters.kinds import load_drafter
from redrafter_mlx.drafters.lookup import Lookup
from redrafter_mlx.drafters.precision import choose_precision
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.files import DTYPES, cast_floating, check_real, check_safetensors, read_json
from redrafter_mlx.generation import Model
from redrafter_mlx.target import Target

from . import default_model
from .config import eos_token_ids, max_length, normalize_config, turn_end
from .gguf import load_gguf
from .hub import locate

NOT_READ = {
    "awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "fbgemm_fp8": "FP8", "hqq": "HQQ", "aqlm": "AQLM",
    "eetq": "EETQ", "quanto": "Quanto", "higgs": "HIGGS", "vptq": "VPTQ", "spqr": "SpQR", "torchao": "TorchAO",
}  # fmt: skip
"""`quant_method` of a config -> its name, where neither mlx-lm nor this project reads the weights."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

SHIPPED_DRAFTERS = Path(__file__).parent.parent / "assets" / "drafters"


def load(
    target: str | Path = default_model.NAME,
    drafter: str | Path | None = None,
    *,
    lookup: bool = True,
    dtype: str | None = None,
    revision: str | None = None,
) -> Model:
    """Load a target with its drafter and tokenizer.

    Args:
        target: default model's name, `.gguf` file, mlx-lm folder or Hugging Face id.
        drafter: drafter folder or Hugging Face id; "lookup" for what is looked up in the text alone; "none" for no
            drafts at all. By default the one shipped for the default model, or a `drafter` folder inside a local
            target's folder.
        lookup: also draft what has stood in the text before.
        dtype: "float32", "float16" or "bfloat16" for weights that are not quantized. Default: as stored on a GPU,
            float32 on the CPU.
        revision: of a Hugging Face id.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, named.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    model, tokenizer, config, name = _load_any(str(target), revision)
    _prepare(model, dtype)
    wrapped = Target(model, name, max_length(config))
    ends = set(eos_token_ids(config))
    if tokenizer is not None:
        ends |= set(tokenizer.eos_token_ids)
        end = turn_end(tokenizer)
        ends |= set() if end is None else {end}
        for token in ends:
            tokenizer.add_eos_token(str(token))
    folder = _drafter_folder(str(target), drafter)
    loaded = None if folder is None else _attached(folder, wrapped)
    looks_up = lookup and str(drafter) != "none"
    if looks_up and loaded is None:
        wrapped.check_tree()
    return Model(wrapped, loaded, tokenizer, frozenset(ends), lookup=Lookup() if looks_up else None)


def _attached(folder: Path, target: Target) -> Drafter:
    # on a GPU the target's dtype: products of two 16-bit dtypes would be computed in float32
    drafter = load_drafter(folder, dtype=target.dtype if on_gpu() else mx.float32)
    drafter.attach(target)
    if isinstance(drafter, RecurrentDrafter):
        choose_precision(drafter, target)
    target.check_tree()
    return drafter


def _load_any(
    target: str, revision: str | None
) -> tuple[nn.Module, TokenizerWrapper | None, dict[str, Any], str]:
    if target == default_model.NAME:
        return *load_gguf(default_model.default_model_path()), target
    if target.endswith(".gguf"):
        return *load_gguf(target), Path(target).stem
    folder = _folder(target, "target", f"{default_model.NAME}, a .gguf file, a folder", revision)
    config = normalize_config(read_json(folder / "config.json"), str(folder / "config.json"))
    _check_weights(folder, config)
    _check_memory(folder, config)
    try:
        model, config = load_model(folder, model_config=config)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        method = config.get("quantization_config")
        kind = method.get("quant_method") if isinstance(method, dict) else None
        hint = f" (its weights are quantized by {kind}: take the original ones)" if kind else ""
        raise ValueError(
            f"{folder} cannot be loaded as an mlx-lm model: {_first_words(error)}{hint}"
        ) from None
    has_tokenizer = any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = _tokenizer(folder, config) if has_tokenizer else None
    generation = folder / "generation_config.json"
    if generation.is_file():
        config["eos_token_id"] = sorted(eos_token_ids(config, read_json(generation)))
    return model, tokenizer, config, Path(target).name


def _folder(source: str, what: str, accepts: str, revision: str | None) -> Path:
    """A local folder or the downloaded one of a Hugging Face id.

    Raises:
        FileNotFoundError: there is none; a file does not count.
    """
    path = locate(source, what, accepts, revision=revision)
    if not path.is_dir():
        raise FileNotFoundError(f"no {what} at {source!r}: give {accepts}, or owner/name on Hugging Face")
    return path


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Check the weight files before any of them is mapped.

    Raises:
        FileNotFoundError, ValueError: there are none, or one that is damaged or in a format that is not read.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        torch = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        if torch:
            raise FileNotFoundError(
                f"{folder} holds PyTorch weights ({torch[0]}) and no model*.safetensors: `redrafter-convert target "
                f"{folder} --out FOLDER` reads them"
            )
        raise FileNotFoundError(f"no model*.safetensors in {folder}")
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
    if method in NOT_READ:
        raise ValueError(
            f"{folder} holds {NOT_READ[method]} weights, which cannot be read: take the model's original weights, or "
            "a version quantized by mlx-lm"
        )


def _tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The folder's tokenizer, read beside the normalized config: transformers checks that too."""
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            check_real(folder / name)
    kinds = {name: value for name, value in config.items() if name in ("model_type", "architectures")}
    with tempfile.TemporaryDirectory() as staged:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken"):
                (Path(staged) / file.name).symlink_to(file.resolve())
        config_file = Path(staged) / "config.json"
        config_file.unlink(missing_ok=True)
        config_file.write_text(json.dumps(kinds))
        try:
            return load_tokenizer(
                Path(staged), {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
            )
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {_first_words(error)}") from None


def _first_words(error: BaseException) -> str:
    """What an error of another library says, without the lists that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    more = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
    return (text if len(text) <= 300 else text[:297] + "...") + more


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
    if needed > memory_bytes():
        raise ValueError(
            f"{folder} is too large for this CPU: dequantized to float32 its weights take about "
            f"{needed / 1e9:.1f} GB, and this process may use {memory_bytes() / 1e9:.1f} GB"
        )


def _prepare(model: nn.Module, dtype: str | None) -> None:
    """Cast to the dtype asked for; on the CPU dequantize, and float32 unless asked otherwise."""
    wanted = DTYPES[dtype] if dtype else None
    if not on_gpu():
        dequantize_model(model)
        wanted = wanted or mx.float32
    elif wanted is None and any("scales" in m for m in model.modules()):
        wanted = next(m["scales"].dtype for m in model.modules() if "scales" in m)
        wanted = wanted if mx.issubdtype(wanted, mx.floating) else None  # mxfp4's scales are integers
    if wanted is not None:
        model.update(tree_map(lambda array: cast_floating(array, wanted), model.parameters()))
    model.eval()
    mx.eval(model.parameters())


def _drafter_folder(target: str, drafter: str | Path | None) -> Path | None:
    if drafter is not None:
        return (
            None if str(drafter) in ("none", "lookup") else _folder(str(drafter), "drafter", "a folder", None)
        )
    candidates = [Path(target).expanduser() / "drafter"]
    if Path(target).name == target:  # a name; joining an absolute path would give that path itself
        candidates.insert(0, SHIPPED_DRAFTERS / target)
    return next((path for path in candidates if (path / "config.json").is_file()), None)
