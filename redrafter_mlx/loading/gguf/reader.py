"""What stands before the weights of a GGUF file, read and checked: nothing after this trusts the file.

Layout of the file: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from redrafter_mlx.files import check_real

UINT32, FLOAT64 = 4, 12  # types in the metadata
MAX_DEPTH = 8  # of arrays in each other

# ggml type id -> (name, values per block, bytes per block)
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
_READABLE = {"F32", "F16", "Q4_0", "Q4_1", "Q8_0"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    """name -> shape, row-major, and ggml type name"""
    kinds: frozenset[int]
    """types of all metadata, those inside arrays too"""


def _read(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize("<" + code)
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return struct.unpack("<" + code, data)[0]


def _read_string(file: BinaryIO) -> str:
    size = _read(file, "Q")
    data = file.read(size) if size < 1 << 30 else b""
    if len(data) != size:
        raise EOFError
    return data.decode("utf-8", errors="replace")


def _read_value(file: BinaryIO, kind: int, kinds: set[int], depth: int = 0) -> Any:
    """A value of the metadata; an array adds the type of its items to `kinds`."""
    if kind == 8:
        return _read_string(file)
    if kind == 9:
        if depth == MAX_DEPTH:
            raise EOFError
        item, count = _read(file, "I"), _read(file, "Q")
        kinds.add(item)
        return [_read_value(file, item, kinds, depth + 1) for _ in range(count)]
    return _read(file, _SCALARS[kind])


def read_header(path: Path) -> GGUFHeader:
    """Read and check everything but the weights; the file must be long enough to hold all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a GGUF, cut short, or with tensor types that MLX cannot read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    check_real(path)
    try:
        with path.open("rb") as file:
            return _parse(file, path)
    except (EOFError, KeyError, struct.error):
        raise ValueError(f"{path} is cut short or damaged: its header cannot be read") from None


def _parse(file: BinaryIO, path: Path) -> GGUFHeader:
    if file.read(4) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version = _read(file, "I")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; versions 2 and 3 can be read")
    num_tensors, num_values = _read(file, "Q"), _read(file, "Q")
    metadata, kinds = {}, set[int]()
    for _ in range(num_values):
        key, kind = _read_string(file), _read(file, "I")
        kinds.add(kind)
        metadata[key] = _read_value(file, kind, kinds)
        if key == "general.alignment" and kind != UINT32:
            raise ValueError(
                f"{path}: general.alignment must be a uint32, not {metadata[key]!r} of type {kind}"
            )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"{path}: general.alignment must be a multiple of 8, not {alignment!r}")
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    unreadable: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for _ in range(num_tensors):
        name = _read_string(file)
        shape = tuple(_read(file, "Q") for _ in range(_read(file, "I")))[::-1]
        kind, offset = _read(file, "I"), _read(file, "Q")
        type_name, block, size = _TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        if type_name not in _READABLE:
            unreadable.setdefault(type_name, name)
        if name in tensors:
            raise ValueError(f"{path} holds the tensor {name} twice")
        tensors[name] = (shape, type_name)
        spans.append((offset, offset + math.prod(shape) // block * size, name))
    if unreadable:
        listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(unreadable.items()))
        raise ValueError(
            f"{path} holds tensor types that MLX cannot read: {listed}; use a file in "
            + ", ".join(sorted(_READABLE))
        )
    _check_layout(path, sorted(spans), alignment, -(-file.tell() // alignment) * alignment)
    return GGUFHeader(metadata, tensors, frozenset(kinds))


def _check_layout(path: Path, spans: list[tuple[int, int, str]], alignment: int, begin: int) -> None:
    """Check that tensors, (offset, end, name) each, follow each other from byte `begin` on and are all there.

    Raises:
        ValueError: they overlap, leave a gap, are not aligned, or the file is cut short.
    """
    expected = 0
    for offset, end, name in spans:
        if offset != expected:
            raise ValueError(f"{path} is damaged: {name} lies at offset {offset}, and {expected} is free")
        expected = -(-end // alignment) * alignment
    needed = begin + max((end for _, end, _ in spans), default=0)
    actual = path.stat().st_size
    if actual < needed:
        raise ValueError(f"{path} is cut short: {actual} bytes of {needed}")
