"""GGUF loading: a tiny Llama written as llama.cpp lays it out, and every way a file can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

from redrafter_mlx.loading.gguf import load_gguf, read_header
from redrafter_mlx.loading.gguf.families import FAMILIES
from redrafter_mlx.text import TextStream

HEADS, KV_HEADS, SIZE = 4, 2, 64
LETTERS = [chr(c) for c in range(33, 127)]
TOKENS = ["<unk>", "<s>", "</s>", "<|user|>", *LETTERS, "Ġ", "Ċ", "th", "the", "Ã", "©"]
MERGES = ["t h", "th e"]

KINDS = {bool: 7, int: 4, float: 6, str: 8}


class Raw:
    """A value with its type in the metadata, as other writers have it."""

    def __init__(self, kind: int, data: bytes) -> None:
        self.kind, self.data = kind, data


def _value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, list):
        kind = KINDS[type(value[0])]
        return struct.pack("<IQ", kind, len(value)) + b"".join(_value(v) for v in value)
    if isinstance(value, str):
        return struct.pack("<Q", len(value.encode())) + value.encode()
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, int]]) -> None:
    """A GGUF v3 file. tensors: name -> (raw data as stored, ggml type); shape from the array's `shape`."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind = value.kind if isinstance(value, Raw) else 9 if isinstance(value, list) else KINDS[type(value)]
        out += _value(key) + struct.pack("<I", kind) + _value(value)
    offset, blobs = 0, b""
    for name, (array, kind) in tensors.items():
        shape, data = array.shape, encode(array, kind)
        out += _value(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", dim) for dim in reversed(shape)) + struct.pack("<IQ", kind, offset)
        data += b"\0" * (-len(data) % 32)
        blobs, offset = blobs + data, offset + len(data)
    path.write_bytes(out + b"\0" * (-len(out) % 32) + blobs)


def encode(array: np.ndarray, kind: int) -> bytes:
    """float32, float16, Q8_0 (scale, 32 x int8) and Q4_1 (scale, minimum, 32 x 4 bit, low half first)."""
    if kind in (0, 1):
        return array.astype([np.float32, np.float16][kind]).tobytes()
    blocks = array.astype(np.float32).reshape(-1, 32)
    if kind == 8:
        scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
        q = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
        return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))
    if kind == 3:
        low = blocks.min(axis=1, keepdims=True)
        scale = ((blocks.max(axis=1, keepdims=True) - low) / 15).astype(np.float16)
        low = low.astype(np.float16)
        q = np.clip(np.round((blocks - low) / scale.astype(np.float32)), 0, 15).astype(np.uint8)
        packed = q[:, :16] | (q[:, 16:] << 4)
        return b"".join(
            s.tobytes() + m.tobytes() + row.tobytes() for s, m, row in zip(scale, low, packed, strict=True)
        )
    return array.tobytes()


def tiny_llama() -> Llama:
    mx.random.seed(0)
    args = ModelArgs(
        model_type="llama", hidden_size=SIZE, num_hidden_layers=2, intermediate_size=96, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, vocab_size=len(TOKENS), head_dim=SIZE // HEADS,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Llama(args)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for interleaved RoPE (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


METADATA: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": SIZE, "llama.block_count": 2,
    "llama.feed_forward_length": 96, "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128, "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.token_type": [3, 3, 3, 3] + [1] * (len(TOKENS) - 4),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}",
}  # fmt: skip


def tensors_of(model: Llama, kind: int) -> dict[str, tuple[np.ndarray, int]]:
    back = {theirs: ours for ours, theirs in FAMILIES["llama"].names.items()}
    out = {}
    for name, array in tree_flatten(model.parameters()):
        stem, data, layer = name.removesuffix(".weight"), np.array(array), ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            layer = f"blk.{index}."
        short = back[stem]
        if short in ("attn_q", "attn_k"):
            data = permuted(data, HEADS if short == "attn_q" else KV_HEADS)
        out[f"{layer}{short}.weight"] = (data, kind if data.ndim == 2 else 0)
    return out


@pytest.mark.parametrize(("kind", "tolerance"), [(0, 1e-5), (1, 5e-3), (8, 0.1), (3, 1.5)])
def test_same_logits_as_the_source(tmp_path: Path, kind: int, tolerance: float) -> None:
    """Tolerances are the rounding of the type: float32, float16, 8 bits, 4 bits."""
    source = tiny_llama()
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, tensors_of(source, kind))
    model, _, config = load_gguf(path)
    tokens = mx.array([[5, 9, 40, 7, 8, 3]])
    want, got = source(tokens), model(tokens)
    assert mx.abs(want - got).max().item() < tolerance
    assert config["tie_word_embeddings"] is False and config["max_position_embeddings"] == 128
    assert ("scales" in model.model.layers[0].self_attn.q_proj) == (kind in (3, 8))


def test_rope_factors(tmp_path: Path) -> None:
    """Llama 3.1's per-frequency divisors come as a tensor."""
    tensors = tensors_of(tiny_llama(), 0)
    factors = np.linspace(1, 8, SIZE // HEADS // 2, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", METADATA, {**tensors, "rope_freqs.weight": (factors, 0)})
    model, _, _ = load_gguf(tmp_path / "m.gguf")
    want = factors * 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(model.layers[1].self_attn.rope._freqs, want, rtol=1e-5)


def test_tokenizer_and_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", METADATA, tensors_of(tiny_llama(), 0))
    _, tokenizer, _ = load_gguf(tmp_path / "m.gguf")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the 12é")) == [
        "the",
        "Ġ",
        "1",
        "2",
        "Ã",
        "©",
    ]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "the"]
    assert tokenizer.eos_token_ids == {2}
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode("the é1")]
    assert "".join([*pieces, stream.finish()]) == "the é1"


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "th",
        "▁the",
    ]
    types = [2, 3, 3] + [6] * 256 + [1] * 6
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0]
    model = Llama(ModelArgs(
        model_type="llama", hidden_size=SIZE, num_hidden_layers=2, intermediate_size=96, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, vocab_size=len(vocab), head_dim=16,
    ))  # fmt: skip
    metadata = {
        **METADATA, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    del metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.pre"]
    write_gguf(tmp_path / "m.gguf", metadata, tensors_of(model, 0))
    loaded, tokenizer, config = load_gguf(tmp_path / "m.gguf")
    assert config["tie_word_embeddings"] is True
    ids = tokenizer.encode("the é", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids).strip() == "the é"
    assert tokenizer.encode("the")[0] == 1, "the llama tokenizer adds a BOS"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"llama.expert_count": 8}, "lacks the metadata key llama.expert_used_count"),
        ({"llama.block_count": None}, "lacks the metadata key llama.block_count"),
        ({"llama.block_count": 3}, "model.layers.2.* missing"),
        ({"llama.feed_forward_length": 128}, "expected"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "wavy"}, "rule 'wavy'"),
        ({"llama.rope.scaling.type": "wavy"}, "RoPE scaling 'wavy'"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata = {k: v for k, v in {**METADATA, **change}.items() if v is not None}
    write_gguf(tmp_path / "m.gguf", metadata, tensors_of(tiny_llama(), 0))
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_unreadable_tensor_type_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(tiny_llama(), 0)
    tensors["output.weight"] = (np.zeros((len(TOKENS), SIZE), np.float32), 15)
    write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    with pytest.raises(ValueError, match=r"cannot be read: type 15 \(output.weight\); known are F32"):
        load_gguf(tmp_path / "m.gguf")


def test_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, tensors_of(tiny_llama(), 0))
    data = path.read_bytes()
    for size in (0, 3, 10, 200, 3000, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut short|not a GGUF"):
            read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"deep": Raw(9, struct.pack("<IQ", 9, 1) * 600 + struct.pack("<IQ", 4, 0))},
            "header cannot be read",
        ),
        ({"general.alignment": Raw(10, struct.pack("<Q", 64))}, "general.alignment must be a uint32"),
        ({"a\nb": 5}, r"a tensor or key is called 'a\\nb'"),
        ({"general.alignment": "32"}, "general.alignment must be a uint32"),
        ({"general.alignment": 7}, "general.alignment must be a multiple of 8"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be an integer"),
        ({"llama.embedding_length": [64, 64]}, "llama.embedding_length must be an integer"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv must be an integer"),
        ({"llama.attention.head_count_kv": [2]}, "head_count_kv must be an integer"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length must be an integer"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "must be a number"),
        ({"llama.block_count": 10**6}, "llama.block_count is 1000000"),
        ({"tokenizer.ggml.bos_token_id": [1, 2]}, "bos_token_id must be an integer"),
        ({"tokenizer.ggml.token_type": 3}, "token_type must be a list"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "needs tokens that there are not"),
        ({"tokenizer.chat_template": 5}, "chat_template must be text"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {**METADATA, **change}, tensors_of(tiny_llama(), 0))
    with pytest.raises(ValueError, match=rule) as error:
        load_gguf(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("shift", "rule"), [(-32, "lies at offset"), (1, "lies at offset")])
def test_tensors_follow_each_other(tmp_path: Path, shift: int, rule: str) -> None:
    """One that overlaps another, or is not aligned: other weights, if they were read."""
    path, tensors = tmp_path / "m.gguf", tensors_of(tiny_llama(), 0)
    write_gguf(path, METADATA, tensors)
    offset = sum(-(-4 * array.size // 32) * 32 for array, _ in list(tensors.values())[:3])
    name = list(tensors)[3]
    data = path.read_bytes()
    at = data.index(struct.pack("<Q", offset), data.index(name.encode()))
    path.write_bytes(data[:at] + struct.pack("<Q", offset + shift) + data[at + 8 :])
    with pytest.raises(ValueError, match=rule):
        load_gguf(path)


def test_float64_in_the_metadata(tmp_path: Path) -> None:
    """MLX's own reader of GGUF files ends the process at one."""
    path = tmp_path / "m.gguf"
    more = {"a": Raw(12, struct.pack("<d", 0.5)), "b": Raw(9, struct.pack("<IQd", 12, 1, 0.5))}
    write_gguf(path, {**METADATA, **more}, tensors_of(tiny_llama(), 0))
    load_gguf(path)
    header = read_header(path)
    assert header.metadata["a"] == 0.5 and header.metadata["b"] == [0.5]


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, tensors_of(tiny_llama(), 0))
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(ValueError, match="8 bytes follow its last tensor"):
        read_header(path)


def split(folder: Path) -> list[Path]:
    """The tiny Llama in two parts, the second with the layers."""
    tensors = tensors_of(tiny_llama(), 0)
    parts = []
    for number in (0, 1):
        path = folder / f"m-{number + 1:05d}-of-00002.gguf"
        held = {name: tensor for name, tensor in tensors.items() if name.startswith("blk") == bool(number)}
        metadata = {**(METADATA if number == 0 else {}), "split.count": 2, "split.no": number}
        write_gguf(path, metadata, held)
        parts.append(path)
    return parts


def test_a_split_file_is_read_whole(tmp_path: Path) -> None:
    parts = split(tmp_path)
    write_gguf(tmp_path / "whole.gguf", METADATA, tensors_of(tiny_llama(), 0))
    tokens = mx.array([[5, 9, 40, 7]])
    want = load_gguf(tmp_path / "whole.gguf")[0](tokens)
    for part in parts:
        assert mx.array_equal(load_gguf(part)[0](tokens), want)


def test_parts_of_other_files(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"named as part 2 of 2 has split.no and count \(0, 2\)"):
        load_gguf(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002.gguf is not beside it"):
        load_gguf(first)


def test_a_size_for_each_layer(tmp_path: Path) -> None:
    metadata = {**METADATA, "llama.attention.head_count_kv": [KV_HEADS] * 2}
    write_gguf(tmp_path / "m.gguf", metadata, tensors_of(tiny_llama(), 0))
    assert load_gguf(tmp_path / "m.gguf")[2]["num_key_value_heads"] == KV_HEADS
