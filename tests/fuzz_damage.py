"""The ways in which `tests.fuzz` damages a file."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 131009\n".format("5e" * 32)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**12, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "x", "4", [], {},
    [None], {"a": 1}, [[[[1]]]], "\x00", "\ud800", "../../etc/passwd", [1, "2", None], "a" * 100_000,
)  # fmt: skip
NOT_FINITE = "not finite"
HEAD = 4096
"""Bytes at the beginning of a file of weights, where its names, shapes and offsets stand"""

Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Damage:
    """A way to damage a file."""

    name: str
    change: Change
    visible: bool = False
    """A reader can see it, so that success is wrong"""

    def apply(self, file: Path, rng: random.Random) -> None:
        """Damage the file."""
        file.write_bytes(self.change(file.read_bytes(), rng))


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) - 1)]


def _flip(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(min(len(out), within or len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    out, begin = bytearray(data), rng.randrange(min(len(data), HEAD))
    size = rng.choice((1, 4, 8, 64))
    out[begin : begin + size] = rng.choice((b"\x00", b"\xff", b"\x7f", b"{"))[:1] * size
    return bytes(out[: len(data)])


def _number(data: bytes, rng: random.Random) -> bytes:
    """Another number at any place of the head, as a size or an offset may stand there."""
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), rng.getrandbits(64)))
    begin = rng.randrange(max(min(len(data), HEAD) - 8, 1))
    return data[:begin] + struct.pack("<Q", value) + data[begin + 8 :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the file a second time, or taken out."""
    begin, size = rng.randrange(min(len(data), HEAD)), rng.choice((1, 3, 8, 100))
    return (
        data[:begin] + (data[begin : begin + size] * 2 if rng.random() < 0.5 else b"") + data[begin + size :]
    )


def _json_value(data: bytes, rng: random.Random) -> bytes:
    """A value anywhere in a JSON file replaced by one that is unlikely, or its key taken out."""
    root = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        keys = node if isinstance(node, dict) else range(min(len(node), 20)) if isinstance(node, list) else ()
        for key in list(keys)[:60]:
            # what stands high up is chosen as often as all that is below it
            places.extend([(node, key)] * max(1, 8 >> depth))
            walk(node[key], depth + 1)

    walk(root, 0)
    owner, key = rng.choice(places)
    if isinstance(owner, dict) and rng.random() < 0.15:
        del owner[key]
    else:
        owner[key] = rng.choice(VALUES)
    return json.dumps(root).encode("utf-8", errors="surrogatepass")


def _deep(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[", b'{"a":')) * 200_000


def _not_utf8(data: bytes, rng: random.Random) -> bytes:
    place = data.index(b'"') + 1
    return data[:place] + b"\xe9" + data[place:]


def _header_value(data: bytes, rng: random.Random) -> bytes:
    """A value in the header of a safetensors file, which stays as long as it says."""
    size = int.from_bytes(data[:8], "little")
    header = _json_value(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _not_finite(data: bytes, rng: random.Random) -> bytes:
    """NaN or infinity for a weight of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = [e["data_offsets"] for n, e in header.items() if n != "__metadata__" and e["dtype"] == "F32"]
    begin, end = rng.choice(spans)
    place = 8 + size + begin + 4 * rng.randrange((end - begin) // 4)
    value = np.float32(rng.choice((np.nan, np.inf, -np.inf))).tobytes()
    return data[:place] + value + data[place + 4 :]


_ANY = (
    Damage("cut short", _cut, True),
    Damage("empty", lambda data, rng: b"", True),
    Damage("a pointer of Git LFS", lambda data, rng: POINTER.encode(), True),
    Damage("bits", _flip),
)
_JSON = (
    *_ANY,
    *(Damage("a value", _json_value),) * 6,
    Damage("longer", lambda data, rng: data + b"}", True),
    Damage("nested deep", _deep, True),
    Damage("not UTF-8", _not_utf8, True),
)
_TEXT = (
    Damage("cut short", _cut),
    Damage("a pointer of Git LFS", lambda data, rng: POINTER.encode(), True),
    Damage("not UTF-8", lambda data, rng: b"\xe9" + data, True),
    Damage("bits", _flip),
    Damage("a piece", _splice),
)
_BINARY = (
    *_ANY,
    Damage("bits of the head", lambda data, rng: _flip(data, rng, HEAD)),
    Damage("a run of bytes", _overwrite),
    Damage("a number", _number),
    Damage("a piece", _splice),
    Damage("random", lambda data, rng: rng.randbytes(len(data) // 2), True),
)
_LONGER = Damage("longer", lambda data, rng: data + bytes(rng.choice((8, 64, 4096))), True)
_SAFETENSORS = (
    *_BINARY, _LONGER, *(Damage("a value of the header", _header_value),) * 4, Damage(NOT_FINITE, _not_finite, True),
)  # fmt: skip


def damages_of(file: Path) -> tuple[Damage, ...]:
    """What may happen to a file of its kind."""
    if file.suffix == ".json":
        return _JSON
    if file.suffix == ".safetensors":
        return _SAFETENSORS
    if file.suffix == ".jinja":
        return _TEXT
    return (*_BINARY, _LONGER) if file.suffix == ".gguf" else _BINARY
