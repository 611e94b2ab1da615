"""Reading and writing files so that a mistake is one clear error and nothing is ever half-written; weights by name.

How a file or folder appears whole or not at all is `output`'s part; its functions are to be had here too.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .output import check_writable as check_writable
from .output import new_file as new_file
from .output import new_folder as new_folder

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""What weights can be cast to, by name."""

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the format bounds it."""

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
_LFS_NOTE = b"version https://git-lfs.github.com/spec"


def cache_dir() -> Path:
    """Where downloads and measurements are kept: `REDRAFTER_CACHE`, else `redrafter-mlx` in the user's cache."""
    if os.environ.get("REDRAFTER_CACHE"):
        return Path(os.environ["REDRAFTER_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "redrafter-mlx"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "redrafter-mlx"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, ValueError: no such file; not a JSON object.
    """
    check_real(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8; nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def check_real(path: Path) -> None:
    """Check that a file is there, and is not the note that Git LFS leaves in its place.

    Raises:
        FileNotFoundError, ValueError: it is not there; it is such a note.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        if file.read(len(_LFS_NOTE)) == _LFS_NOTE:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository, or download it"
            )


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: see `check_safetensors`.
    """
    check_safetensors(path)
    try:
        arrays = mx.load(str(path), format="safetensors")
    except RuntimeError as error:  # whatever its parser finds beyond what is checked here
        raise ValueError(f"{path} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def check_safetensors(path: Path) -> int:
    """Check a safetensors file before MLX, which trusts it, maps it: dtypes that MLX has, shapes that fit their bytes,
    tensors that follow each other without gap or overlap to the file's end, as the format asks. Returns how many.

    Raises:
        FileNotFoundError, ValueError: no such file; not a safetensors file; damaged, with the tensor's name.
    """
    check_real(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = file.read(header_size) if 2 <= header_size <= min(size, MAX_HEADER) else b""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is not a safetensors file, or is cut short in its header")
    if odd := next((name for name in entries if not name.isprintable()), None):
        raise ValueError(f"{path} is damaged: a tensor is called {odd[:40]!r}")
    notes = entries.get("__metadata__") or {}  # MLX writes null where there is none
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError(f"{path}: __metadata__ must be an object of text, not {str(notes)[:60]}")
    spans = sorted(_span(path, name, entry) for name, entry in entries.items() if name != "__metadata__")
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise ValueError(
                f"{path} is damaged: the bytes of {name} begin at {begin}, those before it end at {end}"
            )
        end = stop
    if size != 8 + header_size + end:
        wrong = "cut short" if size < 8 + header_size + end else "damaged"
        raise ValueError(f"{path} is {wrong}: {size} bytes of {8 + header_size + end}")
    return len(spans)


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """First byte, end and name of a tensor.

    Raises:
        ValueError: its entry is not one, or not of a tensor that MLX has.
    """
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        known = ", ".join(sorted(_DTYPE_BYTES))
        raise ValueError(f"{path}: {name} has dtype {str(dtype)[:40]!r}; MLX reads {known}")
    if not _are_sizes(shape) or not _are_sizes(offsets):
        wrong = f"{str(shape)[:60]} and {str(offsets)[:60]}"
        raise ValueError(f"{path}: {name} must have a shape and data_offsets of whole numbers, not {wrong}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{path}: {name} of shape {str(shape)[:60]} and dtype {dtype} cannot lie in bytes {offsets}"
        )
    return offsets[0], offsets[1], name


def _are_sizes(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def write_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, the disk being full, say (MLX itself raises a RuntimeError).
    """
    try:
        mx.save_safetensors(str(path), arrays, metadata=metadata)
    except RuntimeError as error:
        raise OSError(f"{path.parent} cannot hold {path.name}: {error}") from None


def named_weights(module: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its dotted name."""
    return cast(dict[str, mx.array], dict(tree_flatten(module.parameters())))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(array.nbytes for array in named_weights(module).values())


def cast_floating(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """A weight in another dtype where it is a floating one; None keeps its own."""
    return array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array


def check_finite(arrays: Mapping[str, mx.array], where: str) -> None:
    """Check that every floating-point tensor holds numbers only, reading one after the other.

    Raises:
        ValueError: the first that holds NaN or an infinity.
    """
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
            raise ValueError(f"{where}: {name} holds values that are not finite (NaN or infinity)")


def check_weights(module: nn.Module, weights: dict[str, mx.array], where: str) -> None:
    """Compare every tensor's name and shape with what the module has.

    Raises:
        ValueError: all that is missing, superfluous or misshapen in `where`, in one message.
    """
    expected = {name: tuple(array.shape) for name, array in named_weights(module).items()}
    found = {name: tuple(array.shape) for name, array in weights.items()}
    wrong = [f"{name} {expected[name]} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} {found[name]} is not expected" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config: {'; '.join(wrong)}")
