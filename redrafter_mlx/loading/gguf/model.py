"""A GGUF's tensors and metadata as mlx-lm's Llama.

`mx.load` reads the tensors (Q4_0, Q4_1 and Q8_0 stay packed in groups of 32; F16, F32 and the other types it knows
become float arrays). What is left to do: rename the tensors and undo the row permutation llama.cpp applies to q and k.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.files import check_weights

from .metadata import check_metadata
from .reader import FLOAT64, GGUFHeader, read_header
from .tokenizer import load_tokenizer

GROUP_SIZE = 32  # of every packed type mx.load produces from a GGUF
READ_ERRORS = (RuntimeError, ValueError, OverflowError)

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
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
    check_metadata(header, path)
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
    return model, load_tokenizer(header.metadata, path), config


def _packed(weights: dict[str, mx.array]) -> Callable[[str, nn.Module], bool | dict[str, int]]:
    def predicate(name: str, module: nn.Module) -> bool | dict[str, int]:
        scales = weights.get(f"{name}.scales")
        if scales is None:
            return False
        bits = weights[f"{name}.weight"].shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)
        return {"bits": bits, "group_size": GROUP_SIZE}

    return predicate
