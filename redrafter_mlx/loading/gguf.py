"""A `.gguf` file of the Llama family as mlx-lm's Llama, with its tokenizer.

`mx.load` reads the tensors (Q4_0, Q4_1 and Q8_0 stay packed in groups of 32; F16, F32 and the other types
it knows become float arrays). What is left to do: check the file first (`mx.load` trusts it), rename the
tensors, undo the row permutation llama.cpp applies to q and k, and rebuild tokenizer and chat template from
the metadata. Layout of the file: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)

from redrafter_mlx.files import check_real, check_weights

UINT32, FLOAT64 = 4, 12  # types in the metadata
MAX_DEPTH = 8  # of arrays in each other
GROUP_SIZE = 32  # of every packed type mx.load produces from a GGUF
READ_ERRORS = (RuntimeError, ValueError, OverflowError)

# ggml type id -> (name, values per block, bytes per block)
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
_READABLE = {"F32", "F16", "Q4_0", "Q4_1", "Q8_0"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    """name -> shape, row-major, and ggml type name"""
    kinds: frozenset[int]
    """types of all metadata, those inside arrays too"""


def _read(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize("<" + code)
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return struct.unpack("<" + code, data)[0]


def _read_string(file: BinaryIO) -> str:
    size = _read(file, "Q")
    data = file.read(size) if size < 1 << 30 else b""
    if len(data) != size:
        raise EOFError
    return data.decode("utf-8", errors="replace")


def _read_value(file: BinaryIO, kind: int, kinds: set[int], depth: int = 0) -> Any:
    """A value of the metadata; an array adds the type of its items to `kinds`."""
    if kind == 8:
        return _read_string(file)
    if kind == 9:
        if depth == MAX_DEPTH:
            raise EOFError
        item, count = _read(file, "I"), _read(file, "Q")
        kinds.add(item)
        return [_read_value(file, item, kinds, depth + 1) for _ in range(count)]
    return _read(file, _SCALARS[kind])


def read_header(path: Path) -> GGUFHeader:
    """Read and check everything but the weights; the file must be long enough to hold all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a GGUF, cut short, or with tensor types that MLX cannot read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    check_real(path)
    try:
        with path.open("rb") as file:
            return _parse(file, path)
    except (EOFError, KeyError, struct.error):
        raise ValueError(f"{path} is cut short or damaged: its header cannot be read") from None


def _parse(file: BinaryIO, path: Path) -> GGUFHeader:
    if file.read(4) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version = _read(file, "I")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; versions 2 and 3 can be read")
    num_tensors, num_values = _read(file, "Q"), _read(file, "Q")
    metadata, kinds = {}, set[int]()
    for _ in range(num_values):
        key, kind = _read_string(file), _read(file, "I")
        kinds.add(kind)
        metadata[key] = _read_value(file, kind, kinds)
        if key == "general.alignment" and kind != UINT32:
            raise ValueError(
                f"{path}: general.alignment must be a uint32, not {metadata[key]!r} of type {kind}"
            )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"{path}: general.alignment must be a multiple of 8, not {alignment!r}")
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    unreadable: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for _ in range(num_tensors):
        name = _read_string(file)
        shape = tuple(_read(file, "Q") for _ in range(_read(file, "I")))[::-1]
        kind, offset = _read(file, "I"), _read(file, "Q")
        type_name, block, size = _TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        if type_name not in _READABLE:
            unreadable.setdefault(type_name, name)
        if name in tensors:
            raise ValueError(f"{path} holds the tensor {name} twice")
        tensors[name] = (shape, type_name)
        spans.append((offset, offset + math.prod(shape) // block * size, name))
    if unreadable:
        listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(unreadable.items()))
        raise ValueError(
            f"{path} holds tensor types that MLX cannot read: {listed}; use a file in "
            + ", ".join(sorted(_READABLE))
        )
    _check_layout(path, sorted(spans), alignment, -(-file.tell() // alignment) * alignment)
    return GGUFHeader(metadata, tensors, frozenset(kinds))


def _check_layout(path: Path, spans: list[tuple[int, int, str]], alignment: int, begin: int) -> None:
    """Check that tensors, (offset, end, name) each, follow each other from byte `begin` on and are all there.

    Raises:
        ValueError: they overlap, leave a gap, are not aligned, or the file is cut short.
    """
    expected = 0
    for offset, end, name in spans:
        if offset != expected:
            raise ValueError(f"{path} is damaged: {name} lies at offset {offset}, and {expected} is free")
        expected = -(-end // alignment) * alignment
    needed = begin + max((end for _, end, _ in spans), default=0)
    actual = path.stat().st_size
    if actual < needed:
        raise ValueError(f"{path} is cut short: {actual} bytes of {needed}")


def _check_types(header: GGUFHeader, path: Path) -> None:
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


def _load_tensors(path: Path, header: GGUFHeader) -> dict[str, mx.array]:
    """The tensors as MLX reads them. Its reader dies of a float64 in the metadata, so that is refused first.

    Raises:
        ValueError: there is one, or MLX refuses the file.
    """
    if FLOAT64 in header.kinds:
        raise ValueError(f"{path} holds a float64 in its metadata, which MLX's reader cannot read")
    try:
        raw = mx.load(str(path), format="gguf")
    except READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read by MLX: {error}") from None
    assert isinstance(raw, dict)
    return raw


def _config(header: GGUFHeader, path: Path) -> dict[str, Any]:
    """The metadata as a Hugging Face Llama config."""
    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path} has architecture {architecture!r}; only 'llama' can be loaded from a GGUF. "
            "Convert the original checkpoint with `redrafter-convert target` instead"
        )
    if meta.get("llama.expert_count", 0):
        raise ValueError(f"{path} is a mixture of experts, which cannot be loaded from a GGUF")

    def need(key: str) -> Any:
        if f"llama.{key}" not in meta:
            raise ValueError(f"{path} lacks the metadata key llama.{key}")
        return meta[f"llama.{key}"]

    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight")
    num_heads = need("attention.head_count")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", num_heads),
        "rms_norm_eps": round(need("attention.layer_norm_rms_epsilon"), 12),
        "vocab_size": header.tensors["token_embd.weight"][0][0],
        "head_dim": meta.get("llama.attention.key_length", need("embedding_length") // num_heads),
        "max_position_embeddings": need("context_length"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": need("rope.scaling.factor")}
    elif scaling != "none":
        raise ValueError(f"{path} has RoPE scaling {scaling!r}; 'linear' and 'none' can be loaded")
    return config


def _unpermute(rows: mx.array, num_heads: int) -> mx.array:
    """Put q/k rows back from llama.cpp's interleaved order to halves. Packed rows permute alike."""
    out = rows.shape[0]
    return rows.reshape(num_heads, out // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(out, -1)


def _rename(raw: dict[str, mx.array], config: dict[str, Any], path: Path) -> dict[str, mx.array]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights, unknown = {}, []
    for name, array in raw.items():
        stem, _, kind = name.rpartition(".")  # kind: weight, scales or biases (of a packed tensor)
        parts = stem.split(".")
        if stem == "rope_freqs" or name.endswith("attn_rot_embd.weight"):
            continue
        if parts[-1] not in _NAMES or (len(parts) == 3) != (parts[0] == "blk"):
            unknown.append(name)
            continue
        if parts[-1] in heads:
            array = _unpermute(array, heads[parts[-1]])
        prefix = f"model.layers.{parts[1]}." if len(parts) == 3 else ""
        weights[f"{prefix}{_NAMES[parts[-1]]}.{kind}"] = array
    if unknown:
        raise ValueError(f"{path} holds tensors a Llama does not have: {', '.join(sorted(unknown))}")
    return weights


def _set_rope_factors(model: Llama, factors: mx.array, config: dict[str, Any]) -> None:
    """Llama 3.1+: llama.cpp stores the per-frequency divisors themselves."""
    dims = config["head_dim"]
    freqs = factors * config["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    for layer in model.layers:
        layer.self_attn.rope._freqs = freqs


def load_gguf(path: str | Path) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Build (model, tokenizer, config) from a GGUF file; packed weights stay packed.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that cannot be loaded whole.
    """
    path = Path(path)
    header = read_header(path)
    _check_types(header, path)
    config = _config(header, path)
    raw = _load_tensors(path, header)
    factors = raw.get("rope_freqs.weight")
    if factors is not None:  # any values do: they are overwritten by _set_rope_factors
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    weights = _rename(raw, config, path)
    model = Llama(ModelArgs.from_dict(config))
    nn.quantize(model, group_size=GROUP_SIZE, class_predicate=_packed(weights))
    check_weights(model, weights, str(path))
    model.load_weights(list(weights.items()))
    if factors is not None:
        _set_rope_factors(model, factors, config)
    model.eval()
    return model, _tokenizer(header.metadata, path), config


def _packed(weights: dict[str, mx.array]) -> Callable[[str, nn.Module], bool | dict[str, int]]:
    def predicate(name: str, module: nn.Module) -> bool | dict[str, int]:
        scales = weights.get(f"{name}.scales")
        if scales is None:
            return False
        bits = weights[f"{name}.weight"].shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)
        return {"bits": bits, "group_size": GROUP_SIZE}

    return predicate


def _tokenizer(meta: dict[str, Any], path: Path) -> TokenizerWrapper:
    """Tokenizer, special tokens and chat template as the metadata gives them."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = meta.get("tokenizer.ggml.model")
    tokens: list[str] = meta.get("tokenizer.ggml.tokens", [])
    types: list[int] = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(meta, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(meta, tokens, types)
    else:
        raise ValueError(f"{path} has tokenizer {kind!r}; 'gpt2' (BPE) and 'llama' can be loaded")
    assert isinstance(tokenizer, Tokenizer)
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (3, 4)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    bos = token("bos")
    if bos and meta.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    detokenizer = BPEStreamingDetokenizer if kind == "gpt2" else SPMStreamingDetokenizer
    return TokenizerWrapper(fast, detokenizer, eos_token_ids=[e for e in ends if e is not None])


def _byte_level_bpe(meta: dict[str, Any], tokens: list[str], path: Path) -> object:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def split(pattern: str) -> list[Any]:
        return [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rules: dict[str, list[Any]] = {
        "default": [gpt2],
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": split(llama3 % "1,3"),
        "llama3": split(llama3 % "1,3"),
        "qwen2": split(llama3 % "1"),
    }
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in rules:
        known = ", ".join(sorted(rules))
        raise ValueError(f"{path} splits text by the rule {pre!r}; known rules: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        missing = next((part for part in (*merge, "".join(merge)) if part not in vocab), None)
        if len(merge) != 2 or missing is not None:
            raise ValueError(f"{path}: the merge {' '.join(merge)!r} needs tokens that there are not")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.startswith("llama")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(meta: dict[str, Any], tokens: list[str], types: list[int]) -> object:
    """SentencePiece BPE: a merge's rank is the score of the token it makes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, meta.get("tokenizer.ggml.scores", [0.0] * len(tokens)), strict=True))
    skip = [token for token, type_ in zip(tokens, types, strict=True) if type_ != 1]
    merges = generate_merges(vocab, scores, skip)
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space: Any = normalizers.Replace(" ", "▁")
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        space = normalizers.Sequence([normalizers.Prepend("▁"), space])
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
