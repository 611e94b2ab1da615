"""Files of prompts: one JSON value per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a file."""

    id: object
    """the line's `id` or `question_id`; its index among the prompts where it has neither"""
    prompt: str | list[dict[str, str]]
    """a user's text, or messages"""
    category: str = "all"
    """the line's `category`, for figures by kind of task"""

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """As a conversation; `system` goes first where there is no system message yet."""
        said = [user(self.prompt)] if isinstance(self.prompt, str) else list(self.prompt)
        if system is not None and said[0]["role"] != "system":
            said.insert(0, {"role": "system", "content": system})
        return said


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def read_requests(path: Path) -> list[Request]:
    """Prompts of a JSONL file. A line is a string, or an object with "prompt" (text), "messages" or
    "turns" (MT-bench: the first is taken). Blank lines are skipped.

    Raises:
        FileNotFoundError, ValueError: no such file; the first line that is not one; no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no file {path}")
    requests: list[Request] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(json.loads(line.decode()), len(requests)))
        except ValueError as error:  # of JSON and of UTF-8 too
            raise ValueError(f"{path}:{number}: {error}") from None
    if not requests:
        raise ValueError(f"{path} holds no prompts: it needs at least one line")
    return requests


def _request(value: Any, index: int) -> Request:
    if isinstance(value, str):
        return Request(index, _text(value, "the prompt"))
    if not isinstance(value, dict):
        raise ValueError(f"a line must be a string or an object, not {json.dumps(value)[:60]}")
    name = value.get("id", value.get("question_id", index))
    category = str(value.get("category", "all"))
    if "messages" in value:
        return Request(name, _messages(value["messages"]), category)
    if "prompt" in value:
        return Request(name, _text(value["prompt"], '"prompt"'), category)
    if "turns" in value:
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError('"turns" must be a list of strings that is not empty')
        return Request(name, _text(turns[0], '"turns"[0]'), category)
    raise ValueError(f'"prompt", "messages" or "turns" is needed, found {sorted(value) or "nothing"}')


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text that is not empty, not {json.dumps(value)[:60]}")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError('"messages" must be a list that is not empty')
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f'a message needs "role" and "content", both text, not {json.dumps(message)[:60]}'
            )
    return value
