"""Damage done to small input files at random from a seed: bytes of a container, values of a JSON file, tensors.

What the weights' own bytes hold is left alone where a format has no checksum of them: another number is a number too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1.5, 2**31, 10**12, 10**400, float("nan"), float("inf"), "", "x", "5", "../x",
    "a\0b", [], [[]], ["x"], {}, {"x": 1},
)  # fmt: skip
"""Values put in the place of others in a JSON file."""


FREE = frozenset({"rope_theta"})
"""Keys of which another number is another model, and no damage."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def damage_json(text: bytes, rng: Rng) -> tuple[bytes, str]:
    """One value replaced, taken away or doubled under another name, or the text itself cut or nested."""
    kind = rng.integers(0, 10)
    if kind == 0:
        cut = int(rng.integers(0, len(text)))
        return text[:cut], f"cut at {cut}"
    if kind == 1:
        return b'{"x":' + b"[" * 50_000, "nested"
    value = json.loads(text)
    path = _any(rng, places(value))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if kind == 2:
        del holder[path[-1]]
        return json.dumps(value).encode(), f"without {path}"
    is_free = path[-1] in FREE
    new = _any(rng, [value for value in WRONG if not (is_free and type(value) in (int, float) and value > 1)])
    holder[path[-1]] = new
    return json.dumps(value).encode(), f"{path} is {str(new)[:30]!r}"


def damage_bytes(data: bytes, rng: Rng, upto: int | None = None) -> tuple[bytes, str]:
    """Bytes flipped, cut, doubled, zeroed or made large, within the first `upto`."""
    upto = len(data) if upto is None else min(upto, len(data))
    kind, place = rng.integers(0, 6), int(rng.integers(0, upto))
    size = int(rng.integers(1, 9))
    if kind == 0:
        cut = int(rng.integers(0, len(data)))
        return data[:cut], f"cut at {cut}"
    if kind == 1:
        return data[:place] + data[place : place + size] + data[place:], f"{size} bytes doubled at {place}"
    if kind == 2:
        return data[:place] + data[place + size :], f"{size} bytes taken out at {place}"
    if kind == 3:
        return data[:place] + b"\xff" * size + data[place + size :], f"{size} bytes of 255 at {place}"
    if kind == 4:
        return data[:place] + bytes(size) + data[place + size :], f"{size} zeros at {place}"
    new = bytes(rng.integers(0, 256, size, dtype=np.uint8))
    return data[:place] + new + data[place + size :], f"{new!r} at {place}"


def damage_safetensors(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """The header's JSON, or any byte up to the first weight; or a weight that is no number."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.integers(0, 4)
    if kind == 0:
        return damage_bytes(data, rng, upto=8 + size)
    if kind == 1:
        entries = json.loads(data[8 : 8 + size])
        entries.pop("__metadata__", None)
        name = _any(rng, [n for n, entry in entries.items() if entry["dtype"] == "F32"])
        place = 8 + size + entries[name]["data_offsets"][0]
        value = np.float32(_any(rng, (np.nan, np.inf, -np.inf)))
        return data[:place] + value.tobytes() + data[place + 4 :], f"{name} begins with {value}"
    header, what = damage_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :], what


def damage_file(path: Path, rng: Rng) -> str:
    """Damage a file in its place, as its name tells what it is. Returns what was done."""
    data = path.read_bytes()
    kinds: dict[str, Callable[[bytes, Rng], tuple[bytes, str]]] = {
        ".json": damage_json,
        ".safetensors": damage_safetensors,
    }
    new, what = kinds.get(path.suffix, damage_bytes)(data, rng)
    path.write_bytes(new)
    return f"{path.name}: {what}"


def _any(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(0, len(values)))]
