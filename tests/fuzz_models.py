"""The tiny models that `tests.fuzz` damages, and the commands that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

import apps.cli
import convert.__main__
from tests import ggufs
from tests.test_convert_torch_file import write_torch
from tests.toy import CHAT_TEMPLATE, save_folder

MARKER = "/tmp/redrafter-fuzz-code-ran"
"""Written by code in a file, if it ever ran"""

_CONFIGS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def _generate(path: Path, *more: str) -> int:
    command = ["generate", "hi", "--model", str(path), "--max-tokens", "2", *more]
    return apps.cli.main(command)


def _convert(command: str, path: Path, out: Path) -> int:
    return convert.__main__.main([command, str(path), "--out", str(out)])


@dataclass(frozen=True)
class Kind:
    """A model of one kind."""

    files: tuple[str, ...]
    """Which may be damaged"""
    command: Callable[[Path, Path], int]
    """Reads the folder, and may write `out`; returns the exit code"""
    reads_values: bool = True
    """False where only names and shapes are read"""


KINDS: dict[str, Kind] = {
    "folder": Kind(
        (*_CONFIGS, "model.safetensors"), lambda folder, out: _generate(folder, "--drafter", "none")
    ),
    "sentencepiece": Kind(
        ("tokenizer.model", "tokenizer_config.json"), lambda folder, out: _generate(folder, "--raw")
    ),
    "drafter": Kind(
        ("drafter/config.json", "drafter/model.safetensors"), lambda folder, out: _generate(folder)
    ),
    "gguf": Kind(("m.gguf",), lambda folder, out: _generate(folder / "m.gguf")),
    "gguf-packed": Kind(("m.gguf",), lambda folder, out: _generate(folder / "m.gguf")),
    "gguf-split": Kind(
        ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), lambda folder, out: _generate(folder)
    ),
    "target": Kind(
        ("config.json", "model.safetensors", "tokenizer_config.json"),
        lambda folder, out: _convert("target", folder, out),
    ),
    "torch": Kind(
        ("model.pt", "config.json"), lambda folder, out: _convert("drafter", folder, out)
    ),
    "info": Kind(
        ("model-1.safetensors", "model.safetensors.index.json", "config.json"),
        lambda folder, out: convert.__main__.main(["info", str(folder)]),
        reads_values=False,
    ),
}  # fmt: skip
LOADING = ("folder", "sentencepiece", "drafter", "gguf", "gguf-packed", "gguf-split")
"""Those that `redrafter` itself reads"""


def make(kind: str, folder: Path) -> None:
    """Write a model of a kind, undamaged."""
    if kind in ("folder", "drafter", "target"):
        save_folder(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
        return
    if kind == "sentencepiece":
        save_folder(folder)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        _train_sentencepiece(folder)
        return
    folder.mkdir(parents=True)
    if kind.startswith("gguf"):
        path = folder / "m.gguf"
        ggufs.write(path, "llama", kind="Q5_1" if kind == "gguf-packed" else "F32")
        if kind == "gguf-split":
            ggufs.split(path)
        return
    arrays = _drafter_arrays()
    if kind == "torch":
        write_torch(folder / "model.pt", arrays)
    else:
        mx.save_safetensors(str(folder / "model-1.safetensors"), {n: mx.array(a) for n, a in arrays.items()})
        index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, "model-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"hidden_size": 32, "vocab_size": 64, "exit_dim": 64, "num_draft_layers": 1, "rnn": True}
    (folder / "config.json").write_text(json.dumps(config))


def _train_sentencepiece(folder: Path) -> None:
    """A SentencePiece model of 60 pieces as `tokenizer.model`."""
    import sentencepiece

    corpus = folder / "corpus"
    corpus.write_text("\n".join(f"the {word} of {word}s" for word in CHAT_TEMPLATE.split()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()


def _drafter_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "rnn_u.weight": (32, 32), "rnn_u.bias": (32,), "rnn_w.weight": (32, 32), "lm_head.0.linear.weight": (64, 64),
        "lm_head.0.linear.bias": (64,), "lm_head.1.weight": (64, 64),
    }  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
