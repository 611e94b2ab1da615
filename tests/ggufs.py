"""Tiny random models of every architecture that is read from a GGUF, written as llama.cpp's converter lays them out.

The writer is the `gguf` package's; what the converter changes on the way (order of q and k, norms, vectors for rows) is
done here on its own terms, by the names of Hugging Face's tensors.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 64, 96, 4, 2, 16, 4
CONTROL = ["<|end|>", "<|user|>", "<|assistant|>", "<|bos|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokens() -> list[str]:
    """Four control tokens, a token for each byte, and one merge of two."""
    from tokenizers import pre_tokenizers

    return [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]


@dataclass(frozen=True)
class Case:
    """An architecture of a GGUF."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    """What mlx-lm's config has beside the common settings"""
    keys: dict[str, Any] = field(default_factory=dict)
    """The same in the metadata, after the architecture's name"""
    permuted: bool = False
    norms_plus_one: bool = False
    tied: bool = False
    layers: int = 2
    arch: str = ""
    factors: dict[str, list[float]] = field(default_factory=dict)
    """Tensors of RoPE's factors"""


_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MOE_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 32}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
_YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
}  # fmt: skip
_LONG = [1.0 + index / 4 for index in range(HEAD_DIM // 2)]
_BIASES = {"attention_bias": False, "mlp_bias": False}

CASES: dict[str, Case] = {
    "llama": Case("llama", permuted=True),
    "llama-tied": Case("llama", permuted=True, tied=True, arch="llama"),
    "llama-wide-heads": Case(
        "llama", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}, permuted=True,
        arch="llama",
    ),
    "llama-linear": Case(
        "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, permuted=True, arch="llama",
    ),
    "mixtral": Case(
        "mixtral", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        {"expert_count": EXPERTS, "expert_used_count": 2}, permuted=True, arch="llama",
    ),
    "qwen2": Case("qwen2", {"rope_theta": 1e6}, {"rope.freq_base": 1e6}),
    "qwen2-yarn": Case("qwen2", {"rope_scaling": {"type": "yarn", **_YARN}}, _YARN_KEYS, arch="qwen2"),
    "qwen3": Case("qwen3", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    "qwen2moe": Case(
        "qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 64},
        {**_MOE_KEYS, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": Case(
        "qwen3_moe", {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}, _MOE_KEYS,
    ),
    "gemma": Case("gemma", norms_plus_one=True, tied=True),
    "gemma2": Case(
        "gemma2", {"query_pre_attn_scalar": HEAD_DIM},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 256},
        norms_plus_one=True, tied=True,
    ),
    "gemma3": Case(
        "gemma3_text",
        {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8, "sliding_window_pattern": 6, "rope_theta": 1e6,
         "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}},
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
        norms_plus_one=True, tied=True, layers=7,
    ),
    "phi3": Case("phi3"),
    "phi3-long": Case(
        "phi3",
        {"rope_scaling": {"type": "longrope", "long_factor": _LONG, "short_factor": _LONG},
         "original_max_position_embeddings": 128},
        {"rope.scaling.original_context_length": 128,
         "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(128)))},
        factors={"rope_factors_long.weight": _LONG, "rope_factors_short.weight": _LONG}, arch="phi3",
    ),
    "granite": Case(
        "granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.5, **_BIASES},
        {"logit_scale": 4.0, "attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.5}, permuted=True,
    ),
    "smollm3": Case("smollm3", permuted=True, layers=5),
    "gpt-oss": Case(
        "gpt_oss",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8,
         "rope_scaling": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, **_YARN}},
        {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": INNER,
         "attention.sliding_window": 8, "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
         **_YARN_KEYS},
    ),
}  # fmt: skip


def make(name: str, seed: int = 0, rows: int | None = None) -> nn.Module:
    """The model of a case, its weights scaled up so that its choices are clear ones; `rows` of its vocabulary."""
    case = CASES[name]
    config: dict[str, Any] = {
        "model_type": case.model_type, "hidden_size": HIDDEN, "num_hidden_layers": case.layers,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "vocab_size": rows or len(byte_tokens()), "max_position_embeddings": 512,
        "head_dim": HEAD_DIM, "rope_theta": 10000.0, "tie_word_embeddings": case.tied, **case.config,
    }  # fmt: skip
    module = importlib.import_module(f"mlx_lm.models.{case.model_type}")
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    if case.tied and hasattr(model, "sanitize"):
        model.sanitize({})
    weights = []
    for key, array in tree_flatten(model.parameters()):
        if array.ndim == 1:  # norms, biases, sinks
            base = array if "norm" in key else array * 0
            weights.append((key, base + 0.3 * mx.random.normal(array.shape)))
        else:
            embedding = "embed_tokens" in key
            scale = (0.05 if case.norms_plus_one else 0.3) if embedding else 3.0 / array.shape[-1] ** 0.5
            weights.append((key, scale * mx.random.normal(array.shape)))
    model.load_weights(weights)
    mx.eval(model.parameters())
    model.eval()
    return model


_NAMES = (
    (r"^model\.embed_tokens$", "token_embd"), (r"^model\.norm$", "output_norm"), (r"^lm_head$", "output"),
    (r"input_layernorm$", "attn_norm"), (r"pre_feedforward_layernorm$", "ffn_norm"),
    (r"post_feedforward_layernorm$", "post_ffw_norm"), (r"self_attn\.(q|k)_norm$", r"attn_\1_norm"),
    (r"self_attn\.(q|k|v)_proj$", r"attn_\1"), (r"self_attn\.qkv_proj$", "attn_qkv"),
    (r"self_attn\.o_proj$", "attn_output"), (r"self_attn\.sinks$", "attn_sinks"),
    (r"(?:switch_mlp|experts)\.(gate|up|down)_proj$", r"ffn_\1_exps"),
    (r"mlp\.gate_up_proj$", "ffn_up"), (r"mlp\.(gate|up|down)_proj$", r"ffn_\1"),
    (r"mlp\.shared_expert\.(gate|up|down)_proj$", r"ffn_\1_shexp"), (r"shared_expert_gate$", "ffn_gate_inp_shexp"),
    (r"(?:mlp\.gate|mlp\.router|block_sparse_moe\.gate)$", "ffn_gate_inp"),
)  # fmt: skip


def _theirs(key: str, case: Case) -> str:
    """llama.cpp's name for a tensor of mlx-lm's model."""
    stem, part = (key, "weight") if key.endswith("sinks") else key.rsplit(".", 1)
    four_norms = case.model_type in ("gemma2", "gemma3_text") or case.model_type == "gpt_oss"
    names = (*_NAMES, (r"post_attention_layernorm$", "post_attention_norm" if four_norms else "ffn_norm"))
    for pattern, name in names:
        if match := re.search(pattern, stem):
            layer = re.match(r"model\.layers\.(\d+)\.", stem)
            return f"{f'blk.{layer[1]}.' if layer else ''}{match.expand(name)}.{part}"
    raise KeyError(key)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp rotates pairs of neighbors."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def tensors_of(model: nn.Module, name: str) -> dict[str, np.ndarray]:
    """A model's weights as llama.cpp's converter writes them, float32."""
    case, out = CASES[name], {}
    for key, array in tree_flatten(model.parameters()):
        data, theirs = np.array(array.astype(mx.float32)), _theirs(key, case)
        short = theirs.split(".")[-2]
        if case.permuted and short in ("attn_q", "attn_k"):
            data = _interleaved(data, HEADS if short == "attn_q" else KV_HEADS)
        if case.norms_plus_one and short.endswith("norm"):
            data = data + 1
        if short == "ffn_gate_inp_shexp":
            data = data[0]
        out[theirs] = data
    out |= {key: np.array(values, np.float32) for key, values in case.factors.items()}
    return out


def write(
    path: Path,
    name: str,
    seed: int = 0,
    kind: str = "F32",
    tokenizer: Callable[[gguf.GGUFWriter], int] | None = None,
    **changes: Any,
) -> nn.Module:
    """Write a case's GGUF and return its model, whose matrices are rounded as the ggml type `kind` rounds them.

    Args:
        tokenizer: writes another tokenizer than the one of bytes; returns how many tokens it has.
        changes: of the metadata's keys; None takes one out.
    """
    case = CASES[name]
    arch = case.arch or name
    writer = gguf.GGUFWriter(str(path), arch)
    model = make(name, seed, (tokenizer or _write_tokenizer)(writer))
    keys: dict[str, Any] = {
        "context_length": 512, "embedding_length": HIDDEN, "block_count": case.layers,
        "feed_forward_length": INNER, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, **case.keys, **changes,
    }  # fmt: skip
    keys.setdefault("rope.dimension_count", keys["attention.key_length"])
    for key, value in keys.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    number = gguf.GGMLQuantizationType[kind]
    for key, array in tensors_of(model, name).items():
        packed = kind != "F32" and _is_packed(key, array)
        data = gguf.quantize(array, number) if packed else np.ascontiguousarray(array, np.float32)
        writer.add_tensor(key, data, raw_dtype=number if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind != "F32":
        for ours, weight in tree_flatten(model.parameters()):
            if _is_packed(_theirs(ours, case), weight):
                rounded = gguf.dequantize(gguf.quantize(np.array(weight), number), number)
                model.load_weights([(ours, mx.array(rounded))], strict=False)
    return model


def _is_packed(key: str, array: Any) -> bool:
    return array.ndim > 1 and array.shape[0] > 1 and "ffn_gate_inp" not in key


def _write_tokenizer(writer: gguf.GGUFWriter) -> int:
    tokens = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(CONTROL.index("<|bos|>"))
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def split(path: Path) -> list[Path]:
    """Turn a file into two parts with its layers in the second, as `llama-gguf-split` names them."""
    reader = gguf.GGUFReader(str(path))
    parts = []
    for number in (0, 1):
        part = path.with_name(f"{path.stem}-{number + 1:05d}-of-00002.gguf")
        writer = gguf.GGUFWriter(str(part), "llama")
        for name, entry in reader.fields.items() if number == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind, *items = entry.types
                writer.add_key_value(name, entry.contents(), kind, items[-1] if items else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors:
            if tensor.name.startswith("blk") == bool(number):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    path.unlink()
    return parts
