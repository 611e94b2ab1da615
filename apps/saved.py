"""Conversations as JSON files: saved whole, checked when they are read."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter_mlx.prompts import check_text

FORMAT, VERSION = "redrafter-chat", 1


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds."""

    model: str
    system: str | None
    messages: list[dict[str, str]]
    """user and assistant in turn"""


def folder() -> Path:
    """Where conversations without a path are."""
    from redrafter_mlx.files import cache_dir

    return cache_dir() / "chats"


def named(name: str) -> Path:
    """The file for a name that a user gave: a path where it looks like one, else one of the folder's."""
    path = Path(name).expanduser()
    return path if path.suffix == ".json" or len(path.parts) > 1 else folder() / f"{name}.json"


def new_name() -> Path:
    """A file of the folder for a conversation that begins now."""
    return folder() / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"


def last() -> Path:
    """The conversation of the folder that was written last.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"--resume: no conversation was saved in {folder()} yet")
    return files[-1]


def save(path: Path, saved: Saved) -> None:
    """Write it, readable for its owner alone.

    Raises:
        OSError: it cannot be written.
    """
    from redrafter_mlx.files import new_file

    values = {"format": FORMAT, "version": VERSION, "model": saved.model, "system": saved.system}
    with new_file(path) as part:
        part.touch(mode=0o600)
        part.write_text(
            json.dumps({**values, "messages": saved.messages}, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )


def load(path: Path) -> Saved:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError, ValueError: there is none; it is no conversation.
    """
    from redrafter_mlx.files import read_json

    values = read_json(path)
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        found = f"{values.get('format')!r}, version {values.get('version')!r}"
        raise ValueError(f"{path} must be a conversation ({FORMAT!r}, version {VERSION}), not {found}")
    model, system, messages = values.get("model"), values.get("system"), values.get("messages")
    if (
        not isinstance(model, str)
        or not isinstance(system, (str, type(None)))
        or not isinstance(messages, list)
    ):
        raise ValueError(f"{path}: model must be text, system text or null, and messages a list")
    for index, message in enumerate(messages):
        _check(path, index, message)
    if len(messages) % 2:
        raise ValueError(f"{path}: the last message must be the assistant's")
    return Saved(model, system, messages)


def _check(path: Path, index: int, message: Any) -> None:
    role = ("user", "assistant")[index % 2]
    is_right = isinstance(message, dict) and message.keys() == {"role", "content"} and message["role"] == role
    if not is_right or not isinstance(message["content"], str):
        raise ValueError(
            f'{path}: message {index} must be {{"role": "{role}", "content": text}}, not {str(message)[:60]}'
        )
    check_text(message["content"], f"{path}: message {index}")
