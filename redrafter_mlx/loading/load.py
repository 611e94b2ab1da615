"""`load`: a target, its drafter and its tokenizer, from wherever they are.

A target is the name of the default model, a GGUF file (or a folder of one), an mlx-lm folder, or a Hugging Face id. On
the CPU a quantized target is dequantized to float32: its quantized matmul costs linearly per row there, so
drafting could never pay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model

from redrafter_mlx.device import on_gpu
from redrafter_mlx.drafters.history import History
from redrafter_mlx.drafters.interface import Drafter
from redrafter_mlx.drafters.kinds import load_drafter
from redrafter_mlx.drafters.lookup import Lookup
from redrafter_mlx.drafters.precision import choose_precision
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.files import DTYPES, cast_floating, check_finite, named_weights
from redrafter_mlx.generation import Model
from redrafter_mlx.target import Target

from . import default_model
from .config import eos_token_ids, max_length, turn_end
from .folder import load_folder
from .gguf import find_gguf, load_gguf
from .hub import locate
from .published import PUBLISHED, known_drafter, published_drafter

ACCEPTS = f"{default_model.NAME}, a .gguf file, a folder"


def load(
    target: str | Path = default_model.NAME,
    drafter: str | Path | None = None,
    *,
    lookup: bool = True,
    history: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> Model:
    """Load a target with its drafter and tokenizer.

    Args:
        target: default model's name, `.gguf` file, mlx-lm folder or Hugging Face id.
        drafter: drafter folder or Hugging Face id; "lookup" for what is looked up in the text alone; "none" for no
            drafts at all; "published" to fetch the one that is published for this target (see `published`). By default
            the one shipped or fetched before, or a `drafter` folder inside a local target's folder.
        lookup: also draft what has stood in the text before.
        history: folder in which the tokens of prompts and answers are kept between runs (at most 200,000), to be looked
            up in as well. By default nothing is kept.
        dtype: "float32", "float16" or "bfloat16" for weights that are not quantized. Default: as stored on a GPU,
            float32 on the CPU.
        revision: of a Hugging Face id.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, named.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    model, tokenizer, config, name = _load_any(str(target), revision)
    check_finite(named_weights(model), str(target))
    _prepare(model, dtype)
    if dtype == "float16":
        check_finite(named_weights(model), f"{target} in float16, whose largest number is 65504")
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
    if history is not None and not looks_up:
        raise ValueError(f"history {str(history)!r} is looked up in, and looking up was turned off")
    past = None if history is None else History(Path(history).expanduser(), wrapped.name, wrapped.vocab_size)
    if looks_up and loaded is None:
        wrapped.check_tree()
    return Model(wrapped, loaded, tokenizer, frozenset(ends), lookup=Lookup(past) if looks_up else None)


def _attached(folder: Path, target: Target) -> Drafter:
    # on a GPU the target's dtype: products of two 16-bit dtypes would be computed in float32
    drafter = load_drafter(folder, dtype=target.dtype if on_gpu() else mx.float32)
    assert isinstance(drafter, nn.Module)
    check_finite(named_weights(drafter), str(folder))
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
    path = Path(target).expanduser()
    if not path.exists() and path.suffix.lower() == ".gguf":
        raise FileNotFoundError(f"no GGUF file at {path}")
    path = locate(target, "target", ACCEPTS, revision=revision)
    gguf = find_gguf(path)
    if gguf is not None:
        return *load_gguf(gguf), gguf.stem
    if not path.is_dir():
        raise FileNotFoundError(f"no target at {target!r}: give {ACCEPTS}, or owner/name on Hugging Face")
    return *load_folder(path), Path(target).name


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
        if str(drafter) in ("none", "lookup"):
            return None
        if str(drafter) == PUBLISHED:
            return published_drafter(target)
        folder = locate(str(drafter), "drafter", "a folder")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no drafter at {str(drafter)!r}: give a folder, or owner/name on Hugging Face"
            )
        return folder
    path = Path(target).expanduser()
    if target == default_model.NAME or not path.exists():
        return known_drafter(target)
    return path / "drafter" if (path / "drafter" / "config.json").is_file() else None
