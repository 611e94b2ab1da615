"""The values of a GGUF's metadata, each checked by type and size before anything is built from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .reader import GGUFHeader

LARGEST = 1 << 24
"""Bound on any size: nothing is built before it is compared with the tensors."""

_LISTS: dict[str, type | tuple[type, ...]] = {
    "tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str, "tokenizer.ggml.token_type": int,
    "tokenizer.ggml.scores": (int, float),
}  # fmt: skip
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Sizes that may be given for each layer; mlx-lm's models have one for all"""
_TEXTS = ("general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_FLAGS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix")


class Metadata:
    """A file's metadata, read by key: those of its architecture without the prefix.

    Raises:
        ValueError: a value of another type, by its key.
    """

    def __init__(self, header: GGUFHeader, path: Path) -> None:
        self.values, self.tensors, self.path = header.metadata, header.tensors, path
        _check_texts(self.values, path)
        architecture = self.values.get("general.architecture")
        if architecture is None:
            raise ValueError(f"{path} lacks the metadata key general.architecture")
        self.architecture = str(architecture)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{self.path} lacks the metadata key {self.architecture}.{key}")
        return value

    def _refuse(self, key: str, value: Any, rule: str) -> ValueError:
        return ValueError(f"{self.path}: {self.architecture}.{key} must be {rule}, not {str(value)[:60]!r}")

    def has(self, key: str) -> bool:
        """True where the architecture has this key."""
        return f"{self.architecture}.{key}" in self.values

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` to `LARGEST`; needed where there is no default.

        Raises:
            ValueError: it is missing, or none.
        """
        value = self._get(key, default)
        if key in _PER_LAYER and isinstance(value, list) and value == value[:1] * self.size("block_count"):
            value = value[0]  # one a layer, and all the same
        if type(value) is not int or not least <= value <= LARGEST:
            raise self._refuse(key, value, f"an integer from {least} to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; needed where there is no default.

        Raises:
            ValueError: it is missing, or none.
        """
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._refuse(key, value, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0.

        Raises:
            ValueError: it is missing, or none.
        """
        value = self.number(key, default)
        if value <= 0:
            raise self._refuse(key, value, "above 0")
        return value

    def text(self, key: str, default: str) -> str:
        """Text.

        Raises:
            ValueError: it is something else.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._refuse(key, value, "text")
        return value


def _check_texts(values: dict[str, Any], path: Path) -> None:
    """Check what the tokenizer is rebuilt from, and the architecture's name.

    Raises:
        ValueError: one of another type or length, by its key.
    """
    for key, value in values.items():
        rule = _broken_rule(key, value)
        if rule is not None:
            raise ValueError(f"{path}: {key} must be {rule}, not {str(value)[:60]!r}")
    count = len(values.get("tokenizer.ggml.tokens", ()))
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in values and len(values[key]) != count:
            raise ValueError(f"{path}: {key} has {len(values[key])} entries, tokenizer.ggml.tokens {count}")


def _broken_rule(key: str, value: Any) -> str | None:
    """What a value must be and is not; None where it is right, or not used."""
    if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and type(value) is not int:
        return "an integer"
    if key in _LISTS and not (isinstance(value, list) and all(isinstance(v, _LISTS[key]) for v in value)):
        return "a list"
    if (key in _TEXTS or key.startswith("tokenizer.chat_template.")) and not isinstance(value, str):
        return "text"
    if key == "tokenizer.chat_template" and not isinstance(value, str):
        return "text"
    if key in _FLAGS and not isinstance(value, bool):
        return "true or false"
    return None
