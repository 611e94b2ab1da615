"""The values of a GGUF's metadata that are used, checked by type and size before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .reader import GGUFHeader


def check_metadata(header: GGUFHeader, path: Path) -> None:
    """Check the values that are used, before MLX or anything else takes them for what they should be.

    Raises:
        ValueError: one of another type or size, by its key.
    """
    meta = header.metadata
    for key, value in meta.items():
        rule = _broken_rule(key, value)
        if rule is not None:
            raise ValueError(f"{path}: {key} must be {rule}, not {str(value)[:60]}")
    blocks = meta.get("llama.block_count", 0)
    if blocks > len(header.tensors):
        raise ValueError(
            f"{path}: llama.block_count is {blocks}, and there are {len(header.tensors)} tensors"
        )
    count = len(meta.get("tokenizer.ggml.tokens", ()))
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in meta and len(meta[key]) != count:
            raise ValueError(f"{path}: {key} has {len(meta[key])} entries, tokenizer.ggml.tokens {count}")


def _broken_rule(key: str, value: Any) -> str | None:
    """What a value must be and is not; None where it is right, or not used."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in _POSITIVE and not (type(value) is int and 0 < value < 1 << 24):
        return f"an integer from 1 to {(1 << 24) - 1}"
    if key in _NUMBERS and not is_number:
        return "a number"
    if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and type(value) is not int:
        return "an integer"
    if key in _LISTS and not (isinstance(value, list) and all(isinstance(v, _LISTS[key]) for v in value)):
        return "a list"
    if key == "tokenizer.chat_template" and not isinstance(value, str):
        return "text"
    return None


_POSITIVE = {
    "llama.embedding_length", "llama.block_count", "llama.feed_forward_length", "llama.attention.head_count",
    "llama.attention.head_count_kv", "llama.attention.key_length", "llama.context_length",
}  # fmt: skip
_NUMBERS = {
    "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.rope.scaling.factor",
}  # fmt: skip
_LISTS: dict[str, type | tuple[type, ...]] = {
    "tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str, "tokenizer.ggml.token_type": int,
    "tokenizer.ggml.scores": (int, float),
}  # fmt: skip
