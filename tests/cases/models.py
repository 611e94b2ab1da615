"""The tiny models of the cases. Their tokenizer has a token per byte.

`random_model` has random weights: its text is noise, which is enough where only the way it fails matters.
`successor_model` says what is known beforehand, as its next token is a function of the last one alone: after
<|assistant|> come "abc.", then <|end|>, then <|user|>, then "xyz", and again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import toy

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.target import Target

SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|bos|>", "<|endoftext|>"]
STRICT_TEMPLATE = (  # refuses what Gemma's and Mistral's refuse
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') == (loop.index0 % 2 == 1) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BROKEN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfo %}"
SUCCESSORS = {
    "<|assistant|>": "a", "a": "b", "b": "c", "c": ".", ".": "<|end|>", "<|end|>": "<|user|>", "<|user|>": "x",
    "x": "y", "y": "z", "z": "<|assistant|>", "Q": "Ġ", "Ġ": "w", "w": "o",
}  # fmt: skip
SUCCESSOR_SIZE = 272
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip


def vocabulary() -> list[str]:
    """The special tokens and a letter for each byte, as GPT-2 writes them."""
    from tokenizers import pre_tokenizers

    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]


def save_tokenizer(folder: Path, template: str | None, eos: str, bos: bool) -> None:
    """With `bos`, encoding puts <|bos|> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", ids["<|bos|>"])]
        )
    options: dict[str, Any] = {"bos_token": "<|bos|>"} if bos else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False, **options
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def random_model(
    folder: Path,
    *,
    template: str | None = toy.CHAT_TEMPLATE,
    bos: bool = False,
    drafter: bool = True,
    **changes: Any,
) -> Path:
    """A folder with random weights; `changes` go into its config, None takes a key out."""
    folder.mkdir(parents=True)
    save_tokenizer(folder, template, "<|end|>", bos)
    values = {**CONFIG, "vocab_size": len(vocabulary()), "eos_token_id": 0, **changes}
    config = {key: value for key, value in values.items() if value is not None}
    model = toy.make_model("llama", 0, **config)
    save_weights(folder, dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    if drafter:
        save_drafter(toy.make_drafter(Target(model, "tiny")), folder / "drafter")
    return folder


def save_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    """Under a new name first: MLX may still read from the old file."""
    part = folder / "new.safetensors"
    mx.save_safetensors(str(part), weights, metadata={"format": "mlx"})
    part.replace(folder / "model.safetensors")


def edit_config(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> Path:
    weights = dict(mx.load(str(folder / "model.safetensors")))
    change(weights)
    mx.eval(weights)
    save_weights(folder, weights)
    return folder


def edit_header(
    path: Path, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any] | bytes, bytes]]
) -> None:
    """Rewrite a safetensors file; `change` gets its header and its data, and returns what takes their place."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = change(json.loads(raw[8:end]), raw[end:])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def successor_weights() -> tuple[np.ndarray, np.ndarray]:
    """One-hot embeddings, and output rows that find the successor of the last token; both (V, D)."""
    names = vocabulary()
    output = np.zeros((len(names), SUCCESSOR_SIZE), dtype=np.float32)
    for last, following in SUCCESSORS.items():
        output[names.index(following), names.index(last)] = 1.0
    return np.eye(len(names), SUCCESSOR_SIZE, dtype=np.float32), output


def successor_model(folder: Path) -> Path:
    random_model(
        folder, drafter=False, hidden_size=SUCCESSOR_SIZE, num_hidden_layers=1, intermediate_size=16,
        num_key_value_heads=4,
    )  # fmt: skip
    embedding, output = successor_weights()

    def change(weights: dict[str, mx.array]) -> None:
        weights["model.embed_tokens.weight"], weights["lm_head.weight"] = (
            mx.array(embedding),
            mx.array(output),
        )
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.0.{name}.weight"] *= 0

    return edit_weights(folder, change)
