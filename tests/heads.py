"""Random Medusa and Hydra heads, the names their tensors have where they are published, and their formulas in NumPy."""

from __future__ import annotations

from typing import Any

from tests.toy import HIDDEN, VOCAB

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from redrafter_mlx.drafters.heads import HeadsDrafter
from redrafter_mlx.drafters.hydra import Hydra, HydraConfig
from redrafter_mlx.drafters.medusa import Medusa, MedusaConfig
from redrafter_mlx.files import named_weights
from redrafter_mlx.target import Target

Arrays = dict[str, np.ndarray]

PREFIX: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
"""Of a prefix layer, as toy targets of the family "llama" have it."""

MEDUSA: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "three_layers": {"num_layers": 3},
    "one_block_three_times": {"num_layers": 3, "num_blocks": 1},
    "targets_output": {"output": "target"},
    "reduced": {"draft_vocab_size": 20},
}
HYDRA: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "four_layers": {"num_layers": 4, "num_blocks": 2},
    "all_blocks_differ": {"num_layers": 3},
    "not_grounded": {"grounded": False, "num_layers": 3, "num_blocks": 1},
    "prefix": {"prefix": PREFIX},
    "prefix_four_layers": {"prefix": PREFIX, "num_layers": 4, "num_blocks": 2},
    "prefix_not_grounded": {"prefix": PREFIX, "grounded": False, "num_layers": 2, "num_blocks": 1},
}
"""Name -> what the config has beyond the sizes."""

IDS = [(7 * index + 3) % VOCAB for index in range(20)]
"""The target's ids of a reduced vocabulary."""


def make_medusa(seed: int = 2, **changes: Any) -> Medusa:
    """Medusa heads whose every weight is random."""
    mx.random.seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_heads": 3}
    drafter = Medusa(MedusaConfig(**{**sizes, **changes}))
    _randomize(drafter)
    if drafter.config.draft_vocab_size is not None:
        drafter.d2t = mx.array(IDS, dtype=mx.int32) - mx.arange(len(IDS), dtype=mx.int32)
    return drafter


def make_hydra(seed: int = 2, **changes: Any) -> Hydra:
    """Hydra heads whose every weight is random."""
    mx.random.seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_heads": 3}
    drafter = Hydra(HydraConfig(**{**sizes, **changes}))
    _randomize(drafter)
    return drafter


def make_often_right(target: Target, spread: float = 0.05) -> Hydra:
    """Hydra++ that guesses with the target's output matrix, from a layer whose attention and MLP are small beside its
    input: right now and then, and what it guesses depends on all rows before.
    """
    drafter = make_hydra(prefix=PREFIX)
    size = target.hidden_size
    for name, layer in drafter.prefix.named_modules():
        if name in ("o_proj", "down_proj"):
            layer.weight = layer.weight * spread
        if isinstance(layer, nn.RMSNorm):
            layer.weight = mx.ones_like(layer.weight)
    for head in drafter.heads:
        block = head.blocks[0]
        block.linear.weight, block.linear.bias = mx.zeros_like(block.linear.weight), mx.zeros((size,))
        tokens = 0.1 * block.residual.weight[:, size:]  # so that no two paths are equally probable
        block.residual.weight = mx.concatenate([mx.eye(size), tokens], axis=1)
        block.residual.bias, head.output.bias = mx.zeros((size,)), mx.zeros_like(head.output.bias)
        head.output.weight = target.output_rows().astype(mx.float32)
    drafter.eval()
    drafter.attach(target)
    return drafter


def _randomize(drafter: HeadsDrafter) -> None:
    drafter.update(
        tree_map(
            lambda a: (
                0.4 * mx.random.normal(a.shape) + (1.0 if a.ndim == 1 else 0.0)
                if a.dtype == mx.float32
                else a
            ),
            drafter.parameters(),
        )
    )


def published(drafter: HeadsDrafter, is_vllm: bool = False) -> Arrays:
    """Its tensors under the names of a published checkpoint, a block that is applied several times as often."""
    config, weights = drafter.config, named_weights(drafter)
    found: Arrays = {}
    for name, array in weights.items():
        values = np.array(array)
        kind, *rest = name.split(".")
        if kind == "d2t":
            found["token_map"] = values + np.arange(values.size)
        elif kind == "prefix":
            found[_prefix_name(rest[0])] = values
        elif rest[1] == "output":
            found[_output_name(config, rest[0], rest[2], is_vllm)] = values
        else:
            head, _, index, part, end = rest
            last = config.stored_blocks - 1
            copies = [i for i in range(config.num_layers) if min(i, last) == int(index)]
            for copy in copies:
                found[_block_name(config, head, copy, part, end, is_vllm)] = values
    return found


def _prefix_name(part: str) -> str:
    where = "layers.0." if "layernorm" in part else ""
    if part.endswith("_proj"):
        where = "layers.0.mlp." if part.split("_")[0] in ("gate", "up", "down") else "layers.0.self_attn."
    return f"prefix_embeding_layer.{where}{part}.weight"


def _output_name(config: Any, head: str, end: str, is_vllm: bool) -> str:
    if isinstance(config, HydraConfig):
        return f"hydra_lm_head.{head}.{'1.' if config.prefix else ''}{end}"
    return f"lm_heads.{head}.{end}" if is_vllm else f"{head}.{config.num_layers}.{end}"


def _block_name(config: Any, head: str, index: int, part: str, end: str, is_vllm: bool) -> str:  # noqa: PLR0913
    if isinstance(config, HydraConfig):
        place = 2 * index + 1 if config.prefix else index
        return f"hydra_mlp.{head}.{place}.{'res_connection' if part == 'residual' else part}.{end}"
    return f"blocks.{head}.layers.{index}.{end}" if is_vllm else f"{head}.{index}.{part}.{end}"


def reference(config: Any, tensors: Arrays, c: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Logits (V,) of head n - 1, in float64, from published names.

    Args:
        c: (H,) the target's last hidden state, or the prefix layer's output.
        embeddings: (n, H) of the root and the tokens drafted after it.
    """
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    head = len(embeddings) - 1
    is_hydra = isinstance(config, HydraConfig)
    z = np.concatenate([c, *embeddings]) if is_hydra and config.grounded else c
    for index in range(config.num_layers):
        name = _block_name(config, str(head), index, "", "", False).removesuffix("..")
        inner = t[f"{name}.linear.weight"] @ z + t[f"{name}.linear.bias"]
        if f"{name}.res_connection.weight" in t:
            z = t[f"{name}.res_connection.weight"] @ z + t[f"{name}.res_connection.bias"]
        z = z + inner / (1 + np.exp(-inner))
    output = _output_name(config, str(head), "weight", False)
    return t[output] @ z + (t[output.replace("weight", "bias")] if is_hydra else 0)


def prefix_reference(config: HydraConfig, tensors: Arrays, contexts: np.ndarray) -> np.ndarray:
    """Outputs (T, H) of the prefix layer at every position of contexts (T, H), in float64, from published names."""
    values = config.prefix
    assert values is not None
    start = "prefix_embeding_layer."
    t = {
        name.removeprefix(start): a.astype(np.float64)
        for name, a in tensors.items()
        if name.startswith(start)
    }
    size, eps, theta = values["head_dim"], values["rms_norm_eps"], values["rope_theta"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * t[f"{name}.weight"]

    def heads(x: np.ndarray, name: str, rotates: bool) -> np.ndarray:
        y = (x @ t[f"layers.0.self_attn.{name}.weight"].T).reshape(len(x), -1, size)
        if not rotates:
            return y
        angles = np.arange(len(x))[:, None] * theta ** (-2.0 * np.arange(size // 2) / size)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        one, two = y[..., : size // 2], y[..., size // 2 :]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    x = contexts.astype(np.float64)
    n = norm(x, "layers.0.input_layernorm")
    q, k, v = heads(n, "q_proj", True), heads(n, "k_proj", True), heads(n, "v_proj", False)
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, group, axis=1)) / np.sqrt(size)
    scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = np.einsum("hij,jhd->ihd", weights, np.repeat(v, group, axis=1)).reshape(len(x), -1)
    h = x + found @ t["layers.0.self_attn.o_proj.weight"].T
    m = norm(h, "layers.0.post_attention_layernorm")
    gate = m @ t["layers.0.mlp.gate_proj.weight"].T
    inner = gate / (1 + np.exp(-gate)) * (m @ t["layers.0.mlp.up_proj.weight"].T)
    return norm(h + inner @ t["layers.0.mlp.down_proj.weight"].T, "norm")
