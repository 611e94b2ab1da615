"""What stands before the weights of a GGUF file, read and checked: nothing after this trusts the file.

Layout of the file: ggml's docs/gguf.md. A file that was split is read as one, from all its parts.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from redrafter_mlx.files import check_real

from .files import MAGIC, part_paths

UINT32 = 4  # types of values in the metadata
STRING, ARRAY = 8, 9
MAX_DEPTH = 8  # of arrays in each other
MAX_DIMENSIONS = 4
LONGEST_NAME = 256

# ggml type id -> (name, values per block, bytes per block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
"""Those that MLX or the `gguf` package reads: not whole numbers, nor the forms of activations (Q8_1, Q8_K)."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    """from the beginning of the file"""
    size: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    """name -> shape, row-major, and ggml type name"""
    places: dict[str, Place]
    digest: str
    """of the bytes before the weights, and of each file's size and time: another file has another one"""


class _NoName(Exception):
    """A name that cannot be one."""


class _Cursor:
    """Reads values one after the other.

    Raises:
        EOFError: the data end before a value does.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        begin, self.place = self.place, self.place + size
        if size < 0 or self.place > len(self.data):
            raise EOFError
        return self.data[begin : self.place]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def name(self) -> str:
        """A string that is a name: of characters that can be shown.

        Raises:
            _NoName: it is none.
        """
        name = self.string()
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise _NoName(f"a tensor or key is called {name[:40]!r}")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(_SCALARS[kind])
        if depth == MAX_DEPTH:
            raise EOFError
        item, count = self.scalar("I"), self.scalar("Q")
        if item == STRING:
            return self._strings(count)
        if item in _SCALARS:
            code = _SCALARS[item]
            data = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", data))
        if count > len(self.data):  # even empty ones take more bytes than that
            raise EOFError
        return [self.value(item, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """Many strings, as a vocabulary has them: `string` without a call for each."""
        data, place, end, size_at = self.data, self.place, len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            if place + 8 > end:
                raise EOFError
            begin = place + 8
            place = begin + size_at(data, place)[0]
            if place > end:
                raise EOFError
            found.append(data[begin:place].decode("utf-8", errors="replace"))
        self.place = place
        return found


def read_header(path: Path) -> GGUFHeader:
    """Read and check everything but the weights; the files must be long enough to hold all of them.

    Raises:
        FileNotFoundError: there is no such file, or parts of a split one are missing.
        ValueError: not a GGUF, cut short, damaged, or with tensor types that are not read.
    """
    header = _read_file(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return header
    number = header.metadata.get("split.no")
    if type(number) is not int or not 0 <= number < count:
        raise ValueError(
            f"{path}: split.no must be an integer from 0 to {count - 1}, not {str(number)[:40]!r}"
        )
    parts = [_read_file(part) for part in part_paths(path, number, count)]
    return _joined(path, parts)


def _joined(path: Path, parts: list[GGUFHeader]) -> GGUFHeader:
    """The parts of a split file as one header; the metadata is the first one's.

    Raises:
        ValueError: they are not the parts of one file.
    """
    for number, part in enumerate(parts):
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (number, len(parts)):
            raise ValueError(
                f"{path}: the file named as part {number + 1} of {len(parts)} has split.no and count {found}"
            )
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    places: dict[str, Place] = {}
    for part in parts:
        if twice := sorted(part.tensors.keys() & tensors.keys()):
            raise ValueError(f"{path}: two parts hold the tensor {twice[0]}")
        tensors |= part.tensors
        places |= part.places
    digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()
    return replace(parts[0], tensors=tensors, places=places, digest=digest)


def _read_file(path: Path) -> GGUFHeader:
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    check_real(path)
    if path.stat().st_size < len(MAGIC):
        raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data), path)
    except _NoName as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except (EOFError, KeyError, OverflowError, MemoryError, struct.error):
        raise ValueError(f"{path} is cut short or damaged: its header cannot be read") from None


def _parse(cursor: _Cursor, path: Path) -> GGUFHeader:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; versions 2 and 3 can be read")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key, kind = cursor.name(), cursor.scalar("I")
        if key in metadata:
            raise ValueError(f"{path} holds the metadata key {key} twice")
        metadata[key] = cursor.value(kind)
        if key == "general.alignment" and kind != UINT32:
            raise ValueError(
                f"{path}: general.alignment must be a uint32, not {metadata[key]!r} of type {kind}"
            )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"{path}: general.alignment must be a multiple of 8, not {alignment!r}")
    tensors, spans = _tensors(cursor, num_tensors, path)
    begin = -(-cursor.place // alignment) * alignment
    _check_layout(path, sorted(spans), alignment, begin)
    places = {name: Place(path, begin + offset, end - offset) for offset, end, name in spans}
    found = path.stat()
    digest = hashlib.sha256(cursor.data[: cursor.place])
    digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    return GGUFHeader(metadata, tensors, places, digest.hexdigest())


def _tensors(
    cursor: _Cursor, count: int, path: Path
) -> tuple[dict[str, tuple[tuple[int, ...], str]], list[tuple[int, int, str]]]:
    """Shape and type of every tensor by its name, and (offset, end, name) of its bytes.

    Raises:
        ValueError: a name that stands twice, a shape that cannot be, or types that are not read, all by name.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    unreadable: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for _ in range(count):
        name, dimensions = cursor.name(), cursor.scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{path}: {name} has {dimensions} dimensions, at most {MAX_DIMENSIONS} can be")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1] or (1,)
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        type_name, block, size = TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        if size == 0:
            unreadable.setdefault(type_name, name)
        if name in tensors:
            raise ValueError(f"{path} holds the tensor {name} twice")
        if 0 in shape or shape[-1] % block or math.prod(shape) >= 1 << 48:
            raise ValueError(f"{path}: {name} of type {type_name} cannot have the shape {shape}")
        tensors[name] = (shape, type_name)
        spans.append((offset, offset + math.prod(shape) // block * size, name))
    if unreadable:
        listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(unreadable.items()))
        known = ", ".join(name for name, _, _ in TENSOR_TYPES.values())
        raise ValueError(f"{path} holds tensor types that cannot be read: {listed}; known are {known}")
    return tensors, spans


def _check_layout(path: Path, spans: list[tuple[int, int, str]], alignment: int, begin: int) -> None:
    """Check that tensors, (offset, end, name) each, follow each other from byte `begin` on to the file's end.

    Raises:
        ValueError: they overlap, leave a gap, are not aligned, or the file is cut short or goes on after them.
    """
    expected = end = 0
    for offset, end, name in spans:
        if offset != expected:
            raise ValueError(f"{path} is damaged: {name} lies at offset {offset}, and {expected} is free")
        expected = -(-end // alignment) * alignment
    actual = path.stat().st_size
    if spans and actual < begin + end:
        raise ValueError(f"{path} is cut short: {actual} bytes of {begin + end}")
    if spans and actual > begin + expected:
        raise ValueError(f"{path} is damaged: {actual - begin - expected} bytes follow its last tensor")
