"""The architectures that are read: what llama.cpp calls their tensors and settings, and what mlx-lm does.

Tensors: `gguf-py/gguf/tensor_mapping.py` of llama.cpp. What its converter changes on the way and what its models
assume without a key in the file: `convert_hf_to_gguf.py` and `src/llama-model.cpp` there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .metadata import Metadata
from .rope import check_full_rotation, rope_settings

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_TOP, **_ATTENTION, **_MLP}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _experts(router: str, experts: str) -> dict[str, str]:
    return {
        "ffn_gate_inp": router, "ffn_gate_exps": f"{experts}.gate_proj", "ffn_up_exps": f"{experts}.up_proj",
        "ffn_down_exps": f"{experts}.down_proj",
    }  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How an architecture's file becomes a model of mlx-lm."""

    model_type: str
    names: dict[str, str]
    """What stands before `.weight` or `.bias`, after `blk.N.` in a layer -> the same in mlx-lm"""
    settings: Callable[[Metadata], dict[str, Any]] = field(default=lambda _: {})
    """Settings that other families do not have"""
    permuted: bool = False
    """The rows of q and k lie in pairs, as llama.cpp rotates them"""
    norm_offset: float = 0.0
    """What the converter adds to the weights of norms"""
    rope: frozenset[str] = frozenset({"linear", "yarn"})
    """RoPE scalings that mlx-lm's model honors"""
    own_head_dim: bool = True
    """False where mlx-lm's model divides the hidden size by the heads"""
    tied_only: bool = False
    """True where mlx-lm's model has no output head of its own"""
    overflows: bool = False
    """True where hidden states leave float16's range, so that a GPU is to compute in bfloat16"""


def _mixture(meta: Metadata) -> dict[str, int]:
    return {
        "num_experts": meta.size("expert_count"),
        "num_experts_per_tok": meta.size("expert_used_count"),
        "moe_intermediate_size": meta.size("expert_feed_forward_length"),
    }


def _llama(meta: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in meta.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in meta.tensors,
    }


def _mixtral(meta: Metadata) -> dict[str, Any]:
    return {
        "num_local_experts": meta.size("expert_count"),
        "num_experts_per_tok": meta.size("expert_used_count"),
    }


def _qwen2moe(meta: Metadata) -> dict[str, Any]:
    return {
        **_mixture(meta),
        "shared_expert_intermediate_size": meta.size("expert_shared_feed_forward_length"),
    }


def _qwen3moe(meta: Metadata) -> dict[str, Any]:
    return {**_mixture(meta), "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def _query_scalar(meta: Metadata, largest: int) -> int:
    """What queries are divided by the root of: the head's size; in a family's largest model hidden size by heads."""
    heads, hidden = meta.size("attention.head_count"), meta.size("embedding_length")
    by_heads = meta.size("block_count") == largest
    return hidden // heads if by_heads else meta.size("attention.key_length", hidden // heads)


def _gemma2(meta: Metadata) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "attn_logit_softcapping": meta.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.positive("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(meta, 46),
    }
    if meta.has("attention.sliding_window"):
        # mlx-lm's model attends to everything in every layer: right as long as a text fits into the window
        limit = min(meta.size("context_length"), meta.size("attention.sliding_window"))
        settings["max_position_embeddings"] = limit
    return settings


def _gemma3(meta: Metadata) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _query_scalar(meta, 62),
        "sliding_window": meta.size("attention.sliding_window"),
        "sliding_window_pattern": meta.size("attention.sliding_window_pattern", 6),
        "rope_theta": meta.positive("rope.freq_base", 1e6),
        "rope_local_base_freq": meta.positive("rope.freq_base_swa", 1e4),
    }


def _phi3(meta: Metadata) -> dict[str, Any]:
    heads, hidden = meta.size("attention.head_count"), meta.size("embedding_length")
    rotated = meta.size("rope.dimension_count", hidden // heads)
    return {
        "partial_rotary_factor": rotated / (hidden // heads),
        "original_max_position_embeddings": meta.size(
            "rope.scaling.original_context_length", meta.size("context_length")
        ),
    }


def _granite(meta: Metadata) -> dict[str, Any]:
    return {
        "attention_multiplier": meta.positive("attention.scale"),
        "embedding_multiplier": meta.positive("embedding_scale"),
        "residual_multiplier": meta.positive("residual_scale"),
        "logits_scaling": meta.positive("logit_scale"),
        **_llama(meta),
    }


def _gpt_oss(meta: Metadata) -> dict[str, Any]:
    layers = meta.size("block_count")
    return {
        "num_local_experts": meta.size("expert_count"),
        "num_experts_per_tok": meta.size("expert_used_count"),
        "intermediate_size": meta.size("expert_feed_forward_length"),
        "sliding_window": meta.size("attention.sliding_window"),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
    }


_NONE: frozenset[str] = frozenset()
_LINEAR = frozenset({"linear"})
_LLAMA_ROPE = frozenset({"linear", "yarn", "llama3"})
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_MIXTURE = {**_TOP, **_ATTENTION, **_experts("mlp.gate", "mlp.switch_mlp")}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _DENSE, _llama, permuted=True, rope=_LLAMA_ROPE),
    "qwen2": Family("qwen2", _DENSE, rope=_LLAMA_ROPE, own_head_dim=False),
    "qwen3": Family("qwen3", {**_DENSE, **_HEAD_NORMS}, rope=_LLAMA_ROPE),
    "qwen2moe": Family("qwen2_moe", {**_MIXTURE, **_SHARED}, _qwen2moe, rope=_LINEAR, own_head_dim=False),
    "qwen3moe": Family("qwen3_moe", {**_MIXTURE, **_HEAD_NORMS}, _qwen3moe, rope=_NONE),
    "gemma": Family("gemma", _DENSE, norm_offset=1.0, rope=_NONE, tied_only=True, overflows=True),
    "gemma2": Family(
        "gemma2", {**_DENSE, **_FOUR_NORMS}, _gemma2, norm_offset=1.0, rope=_NONE, tied_only=True, overflows=True,
    ),
    "gemma3": Family(
        "gemma3_text", {**_DENSE, **_FOUR_NORMS, **_HEAD_NORMS}, _gemma3, norm_offset=1.0, rope=_LINEAR,
        overflows=True,
    ),
    "phi3": Family(
        "phi3",
        {**_TOP, **_ATTENTION, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj",
         "ffn_down": "mlp.down_proj"},
        _phi3, rope=frozenset({"longrope"}), own_head_dim=False,
    ),
    "granite": Family("granite", _DENSE, _granite, permuted=True, own_head_dim=False),
    "smollm3": Family("smollm3", _DENSE, _llama, permuted=True, rope=_LLAMA_ROPE),
    "gpt-oss": Family(
        "gpt_oss",
        {**_TOP, **_ATTENTION, **_experts("mlp.router", "mlp.experts"),
         "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
        _gpt_oss, overflows=True,
    ),
}  # fmt: skip
"""By `general.architecture`. Mistral's files are called llama."""

MIXTRAL = Family(
    "mixtral",
    {**_TOP, **_ATTENTION, **_experts("block_sparse_moe.gate", "block_sparse_moe.switch_mlp")},
    _mixtral,
    permuted=True,
    rope=_NONE,
    own_head_dim=False,
)
"""A llama that has experts."""


def family_of(meta: Metadata) -> Family:
    """The family of a file.

    Raises:
        ValueError: its architecture is not among them.
    """
    if meta.architecture == "llama" and meta.size("expert_count", 0, least=0):
        return MIXTRAL
    family = FAMILIES.get(meta.architecture)
    if family is None:
        raise ValueError(
            f"{meta.path} has architecture {meta.architecture!r}; from a GGUF {', '.join(sorted(FAMILIES))} can be "
            "loaded. Convert the original checkpoint with `redrafter-convert target` instead"
        )
    return family


def config_of(meta: Metadata, family: Family) -> dict[str, Any]:
    """The metadata as the config that Hugging Face has for the same model.

    Raises:
        ValueError: a setting is missing, impossible, or not honored by mlx-lm's model.
    """
    if "token_embd.weight" not in meta.tensors:
        raise ValueError(f"{meta.path} lacks the tensor token_embd.weight")
    heads, hidden, layers = (
        meta.size(key) for key in ("attention.head_count", "embedding_length", "block_count")
    )
    if layers > len(meta.tensors):
        raise ValueError(
            f"{meta.path}: {meta.architecture}.block_count is {layers}, and there are {len(meta.tensors)} tensors"
        )
    by_division = max(hidden // heads, 1)
    head_dim = meta.size("attention.key_length", by_division)
    if meta.size("attention.value_length", head_dim) != head_dim or (
        not family.own_head_dim and (head_dim != by_division or hidden % heads)
    ):
        raise ValueError(
            f"{meta.path}: heads of {head_dim} and values of {meta.size('attention.value_length', head_dim)} with "
            f"hidden size {hidden} and {heads} heads are not what mlx-lm's {family.model_type} computes"
        )
    tied = "output.weight" not in meta.tensors
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": meta.size("feed_forward_length", meta.size("expert_feed_forward_length", 1)),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.size("attention.head_count_kv", heads),
        "rms_norm_eps": round(meta.positive("attention.layer_norm_rms_epsilon"), 12),
        "vocab_size": meta.tensors["token_embd.weight"][0][0],
        "head_dim": head_dim,
        "max_position_embeddings": meta.size("context_length"),
        "rope_theta": meta.positive("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied or family.tied_only,
        "bos_token_id": meta.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.values.get("tokenizer.ggml.eos_token_id"),
    }
    if "longrope" not in family.rope:
        check_full_rotation(meta, head_dim)
    return {**config, **rope_settings(meta, family.rope), **family.settings(meta)}
