"""`load`: a target, its drafter and its tokenizer, from wherever they are.

A target is the name of the default model, a `.gguf` file, an mlx-lm folder, or a Hugging Face id. On the
CPU a quantised target is dequantised to float32: its quantised matmul costs linearly per row there, so
drafting could never pay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import dequantize_model, load_model

from . import default_model
from .device import on_gpu
from .drafter import load_drafter
from .files import read_json
from .generation import Model
from .gguf import load_gguf
from .lightest import lightest
from .target import Target

BUNDLED_DRAFTERS = Path(__file__).parent / "drafters"
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    target: str | Path = default_model.NAME,
    drafter: str | Path | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
) -> Model:
    """Load a target with its drafter and tokenizer.

    Args:
        target: default model's name, `.gguf` file, mlx-lm folder or Hugging Face id.
        drafter: drafter folder or Hugging Face id; "none" for none. By default the one shipped for the
        default
            model, and a `drafter` folder inside a local target's folder.
        dtype: "float32", "float16" or "bfloat16" for weights that are not quantised. Default: as stored on
        a GPU,
            float32 on the CPU.
        revision: of a Hugging Face id.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, named.
    """
    model, tokenizer, config, name = _load_any(str(target), revision)
    _prepare(model, dtype)
    limits = [config.get(k) for k in ("max_position_embeddings", "n_positions", "max_seq_len")]
    wrapped = Target(model, name, next((limit for limit in limits if limit), None))
    folder = _drafter_folder(str(target), drafter)
    if folder is None:
        return Model(wrapped, None, tokenizer)
    # on a GPU the target's dtype: products of two 16-bit dtypes would be computed in float32
    loaded = load_drafter(folder, dtype=wrapped.dtype if on_gpu() else mx.float32)
    scale = loaded.config.embedding_scale
    if loaded.config.target and abs(scale - wrapped.embedding_scale) > 1e-3 * abs(scale):
        raise ValueError(
            f"this drafter does not fit the target: it was trained on embeddings scaled by {scale}, "
            f"{name} scales by {wrapped.embedding_scale}"
        )
    wrapped.watch(loaded.config.context_layers)
    loaded = lightest(loaded.bind(wrapped), wrapped).settle()
    wrapped.check_tree()
    mx.eval(loaded.parameters())
    return Model(wrapped, loaded, tokenizer)


def _load_any(
    target: str, revision: str | None
) -> tuple[nn.Module, TokenizerWrapper | None, dict[str, Any], str]:
    if target == default_model.NAME:
        return *load_gguf(default_model.default_model_path()), target
    if target.endswith(".gguf"):
        return *load_gguf(target), Path(target).stem
    folder = _folder(target, revision, "target")
    config = read_json(folder / "config.json")
    try:
        model, config = load_model(folder)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded as an mlx-lm model: {error}") from None
    has_tokenizer = any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id")) if has_tokenizer else None
    return model, tokenizer, config, Path(target).name


def _folder(source: str, revision: str | None, what: str) -> Path:
    """A local folder as it is, a Hugging Face id as its downloaded snapshot."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"no {what} at {source!r}: give {default_model.NAME}, a .gguf file, a folder, or owner/name on "
            "Hugging Face"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no {what} folder {source!r} here, and none from Hugging Face: {reason}"
        ) from None


def _prepare(model: nn.Module, dtype: str | None) -> None:
    """Cast to the dtype asked for; on the CPU dequantise, and float32 unless asked otherwise."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    wanted = _DTYPES[dtype] if dtype else None
    if not on_gpu():
        dequantize_model(model)
        wanted = wanted or mx.float32
    elif wanted is None and any("scales" in m for m in model.modules()):
        wanted = next(m["scales"].dtype for m in model.modules() if "scales" in m)
        wanted = wanted if mx.issubdtype(wanted, mx.floating) else None  # mxfp4's scales are integers
    if wanted is not None:
        model.update(
            tree_map(
                lambda a: a.astype(wanted) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()
            )
        )
    model.eval()
    mx.eval(model.parameters())


def _drafter_folder(target: str, drafter: str | Path | None) -> Path | None:
    if drafter is not None:
        return None if str(drafter) == "none" else _folder(str(drafter), None, "drafter")
    candidates = [Path(target).expanduser() / "drafter"]
    if Path(target).name == target:  # a name; joining an absolute path would give that path itself
        candidates.insert(0, BUNDLED_DRAFTERS / target)
    return next((path for path in candidates if (path / "config.json").is_file()), None)
