"""Which file is a GGUF, and which files are the parts of one: known by their first bytes, whatever they are called."""

from __future__ import annotations

import re
from pathlib import Path

MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)


def find_gguf(path: Path) -> Path | None:
    """The GGUF that `path` is, or that a folder without other weights holds; None where it is something else.

    Ollama keeps GGUF files under the names of their digests, and other programs end them in `.GGUF`.

    Raises:
        ValueError: the folder holds several models of that kind.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _begins(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(file for file in path.iterdir() if file.is_file() and _begins(file))
    # an image encoder lies beside its language model
    models = [file for file in found if not file.name.startswith("mmproj")] or found
    firsts = [
        file for file in models if (part := _PART.fullmatch(file.name)) is None or int(part["number"]) == 1
    ]
    firsts = firsts or models[:1]
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:8])
        raise ValueError(f"{path} holds {len(firsts)} GGUF files: name one of {names}")
    return firsts[0] if firsts else None


def _begins(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def part_paths(path: Path, number: int, count: int) -> list[Path]:
    """The files of a split GGUF, in order.

    Args:
        path: one of them.
        number: which one it says it is, from 0.
        count: of how many.

    Raises:
        FileNotFoundError, ValueError: the others are not beside it, or it is not called as a part is.
    """
    named = _PART.fullmatch(path.name)
    first = path.name if number == 0 else "the first part"
    merge = f"merge them with `llama-gguf-split --merge {first} merged.gguf` and load that"
    if named is None or (int(named["number"]), int(named["count"])) != (number + 1, count):
        raise ValueError(
            f"{path} is part {number + 1} of {count} of a split GGUF, and is not called "
            f"NAME-{number + 1:05d}-of-{count:05d}.gguf, so the others cannot be found: {merge}"
        )
    parts = [
        path.with_name(f"{named['stem']}-{n + 1:05d}-of-{count:05d}{named['end']}") for n in range(count)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(
            f"{path} is part {number + 1} of {count} of a split GGUF, and {missing[0]} is not beside it: get all "
            f"parts into one folder, or {merge}"
        )
    return parts
