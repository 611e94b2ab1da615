"""Tiny models for tests: random weights from a seed, sizes that run in milliseconds."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redrafter_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.generation import Model
from redrafter_mlx.target import Target

VOCAB, HIDDEN = 64, 32

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

# family -> (config, whether any layer has a sliding window)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3_rope": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_window": {
        "model_type": "llama",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 12,
    },
    "qwen2": {"model_type": "qwen2", "rope_theta": 10000.0},
    "qwen3": {"model_type": "qwen3", "rope_theta": 10000.0, "head_dim": 8},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 12, "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 8, "rope_local_base_freq": 10000.0,
    },
    "phi3": {"model_type": "phi3", "rope_theta": 10000.0},
    "granite": {
        "model_type": "granite", "logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
    },
}  # fmt: skip


def make_model(family: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny mlx-lm model. Weights are scaled up so that its greedy choices are clear ones."""
    config = {**_COMMON, **FAMILIES[family], **changes}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    args = module.ModelArgs.from_dict(config)
    mx.random.seed(seed)
    model = module.Model(args)
    if hasattr(model, "sanitize") and "gemma3" in family:
        model.sanitize({})  # ties the embeddings
    for _, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight = layer.weight * 5.0
        if isinstance(layer, nn.Embedding):
            scale = 0.05 if family.startswith("gemma") else 0.3  # gemma multiplies it up again
            layer.weight = mx.random.normal(layer.weight.shape) * scale
    model.eval()
    mx.eval(model.parameters())
    return model


def make_target(family: str = "llama", seed: int = 0, **changes: Any) -> Target:
    return Target(make_model(family, seed, **changes), f"tiny-{family}", max_length=512)


def make_wide_head(head_size: int = 64) -> Target:
    """A llama whose one head is as wide as a group of a quantized KV cache; its logits are small."""
    from mlx_lm.models import llama

    mx.random.seed(3)
    args = llama.ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=1,
        rms_norm_eps=1e-5, vocab_size=VOCAB, head_dim=head_size,
    )  # fmt: skip
    model = llama.Model(args)
    model.model.embed_tokens.weight = mx.random.normal((VOCAB, 64)) * 0.5
    model.eval()
    return Target(model, "wide", 512)


def make_drafter(target: Target, seed: int = 1, **changes: Any) -> RecurrentDrafter:
    """A random drafter of the target's sizes, attached: nearly always wrong, which exactness must not notice.

    It is in training mode, so its weights can be changed; `eval()` and another `attach` optimize their layout.
    """
    values: dict[str, Any] = {
        "vocab_size": target.vocab_size, "hidden_size": target.hidden_size, "exit_dim": 2 * target.hidden_size,
        "num_draft_layers": 1, "embedding_scale": target.embedding_scale, **changes,
    }  # fmt: skip
    mx.random.seed(seed)
    drafter = RecurrentDrafter(DrafterConfig(**values))
    drafter.attach(target)
    return drafter


def make_often_right(target: Target) -> RecurrentDrafter:
    """A drafter that shares the target's head on its hidden state: right now and then, so paths branch."""
    drafter = make_drafter(target, head="factored", num_draft_layers=0)
    size = target.hidden_size
    drafter.lm_head[-1].weight = mx.concatenate([0.3 * mx.eye(size), mx.zeros((size, size))], axis=1)
    return drafter


def make(family: str = "llama", seed: int = 0, head_dim: int | None = None, **changes: Any) -> Model:
    """A model with a drafter; `changes` are those of `make_drafter`."""
    target = make_target(family, seed, **({} if head_dim is None else {"head_dim": head_dim}))
    return Model(target, make_drafter(target, **changes))


@dataclass(frozen=True)
class RopeCase:
    make: Callable[[], nn.Module]
    """A rope for heads of 16."""
    rotates_halves: bool
    """True where it rotates the two halves of a vector, so that a table serves."""


_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "plain": RopeCase(lambda: nn.RoPE(16), True),
    "scaled": RopeCase(lambda: nn.RoPE(16, base=500.0, scale=0.25), True),
    "llama3": RopeCase(lambda: initialize_rope(16, 10000.0, False, _LLAMA3, 512), True),
    "yarn, which scales too": RopeCase(lambda: initialize_rope(16, 10000.0, False, _YARN, 512), True),
    "pairs side by side": RopeCase(lambda: nn.RoPE(16, traditional=True), False),
    "half of the vector": RopeCase(lambda: nn.RoPE(8), False),
}


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_folder(folder: Path, max_length: int = 512, seed: int = 0) -> Path:
    """A tiny Llama as an mlx-lm folder with a byte tokenizer, a chat template and a random drafter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"vocab_size": len(vocab), "max_position_embeddings": max_length}
    model = make_model("llama", seed, **sizes)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {**_COMMON, **FAMILIES["llama"], **sizes, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    save_drafter(make_drafter(Target(model, "tiny")), folder / "drafter")
    return folder
