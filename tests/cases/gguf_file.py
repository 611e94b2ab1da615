"""GGUF files of the successor model, right and wrong: metadata of any type, tensors that lie about where they are."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.toy import CHAT_TEMPLATE

# isort: split
import numpy as np

from .models import SPECIALS, SUCCESSOR_SIZE, successor_weights, vocabulary

Raw = tuple[int, bytes]
"""A value of the metadata as its type and its bytes."""

_TYPES: dict[type, tuple[int, str]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


def value(given: Any) -> Raw:
    if isinstance(given, tuple):
        return given
    if isinstance(given, str):
        return 8, struct.pack("<Q", len(given.encode())) + given.encode()
    if isinstance(given, list):
        items = [value(item) for item in given]
        return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)
    kind, code = _TYPES[type(given)]
    return kind, struct.pack(code, given)


def metadata() -> dict[str, Any]:
    heads = 4
    return {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": 1,
        "llama.context_length": 512, "llama.embedding_length": SUCCESSOR_SIZE, "llama.feed_forward_length": 16,
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": SUCCESSOR_SIZE // heads,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * 256, "tokenizer.ggml.bos_token_id": 4,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    rng, size, ff = np.random.default_rng(0), SUCCESSOR_SIZE, 16
    embedding, output = successor_weights()
    shapes = {"attn_q": (size, size), "attn_k": (size, size), "attn_v": (size, size), "ffn_gate": (ff, size),
              "ffn_up": (ff, size)}  # fmt: skip
    found = {f"blk.0.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    found |= {
        "blk.0.attn_output.weight": np.zeros((size, size)),
        "blk.0.ffn_down.weight": np.zeros((size, ff)),
    }
    found |= {f"blk.0.{name}.weight": np.ones(size) for name in ("attn_norm", "ffn_norm")}
    return found | {
        "token_embd.weight": embedding,
        "output.weight": output,
        "output_norm.weight": np.ones(size),
    }


def save_gguf(
    path: Path,
    changes: dict[str, Any] | None = None,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    offsets: dict[str, int] | None = None,
    alignment: int = 32,
) -> Path:
    """A GGUF of float32 tensors.

    Args:
        changes: of the metadata.
        keep: which tensors are in it.
        offsets: where tensors claim to begin, in bytes from the first one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, kept = {**metadata(), **(changes or {})}, {n: a for n, a in tensors().items() if keep(n)}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(kept), len(meta))
    for key, given in meta.items():
        kind, data = value(given)
        out += value(key)[1] + struct.pack("<I", kind) + data
    blobs = b""
    for name, array in kept.items():
        data = np.ascontiguousarray(array, dtype=np.float32).tobytes()
        out += value(name)[1] + struct.pack("<I", array.ndim)
        out += b"".join(struct.pack("<Q", size) for size in reversed(array.shape))
        out += struct.pack("<IQ", 0, (offsets or {}).get(name, len(blobs)))
        blobs += data + b"\0" * (-len(data) % alignment)
    path.write_bytes(out + b"\0" * (-len(out) % alignment) + blobs)
    return path
