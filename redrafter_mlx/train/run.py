"""From a target to a finished drafter: generate the data, train, export. This is what `redrafter train` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from redrafter_mlx.drafters.kinds import load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter, changed, quantize
from redrafter_mlx.files import weight_bytes
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

from .calibrate import calibrate
from .corpus import Corpus
from .data import Generator, Recipe, Text
from .prompts import Messages, read_excluded, read_prompts
from .replay import held_out
from .trainer import Settings, Trainer, choose_vocabulary, new_drafter

CALIBRATION_POSITIONS = 4000


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a drafter; see `DrafterConfig`."""

    exit_dim: int | None = None
    """None: see `default_exit_dim`."""
    num_draft_layers: int = 2
    head: str = "factored"
    draft_vocab_size: int | None = 6144
    """The drafter's vocabulary: this many of the text's most common tokens. None, or more than the target has: all."""
    rnn: bool = True

    def config(self, target: Target) -> DrafterConfig:
        """The config of a new drafter for `target` with the context layers it watches."""
        size = target.hidden_size
        vocab = self.draft_vocab_size
        return DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=size,
            exit_dim=self.exit_dim or default_exit_dim(size),
            num_draft_layers=self.num_draft_layers,
            rnn=self.rnn,
            head=self.head,
            draft_vocab_size=vocab if vocab is not None and vocab < target.vocab_size else None,
            context_layers=target.context_layers,
            embedding_scale=target.embedding_scale,
            target={
                "name": target.name,
                "hidden_size": size,
                "vocab_size": target.vocab_size,
            },
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What one training run is asked to do."""

    out: Path
    """Folder of the drafter, its checkpoints and, under `data`, its text."""
    prompts: Path | None = None
    """File or folder of prompts; None: the target writes its own."""
    text: Path | None = None
    """Answers that the target generated before (see `Text`), used instead of new ones."""
    num_answers: int = 1000
    """Number of answers to generate; with `prompts`, at most one per prompt."""
    exclude: Path | None = None
    """Prompts never to be trained on: a benchmark's."""
    context_layers: tuple[int, ...] | None = None
    """Target layers whose output the drafter reads. None: a low, a middle and a high one."""
    rows: int = 96
    max_tokens: int = 160
    data_seed: int = 0
    disk_budget: float | None = None
    """Bytes of contexts from which on no more text is generated; None: no limit."""
    start_from: Path | None = None
    """A drafter of this target to continue from; its shape is kept. None: a new one."""
    vocabulary: int | None = None
    """With `start_from`: give it this many of the text's most common tokens as a new vocabulary, 0: all. None: keep its
    own."""
    shape: Shape = field(default_factory=Shape)
    settings: Settings = field(default_factory=Settings)


def default_exit_dim(hidden_size: int) -> int:
    """A multiple of 64 near 4/3 of the hidden size; the hidden size itself for large targets.

    The cost of a drafter grows with the square of its width, and it runs L - 1 times in a step. This width keeps what
    it reads below a tenth of what a target of 7 billion weights reads.
    """
    width = hidden_size if hidden_size >= 2048 else 4 * hidden_size // 3
    return max(64, width // 64 * 64)


def default_context_layers(num_layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as EAGLE-3 (arXiv 2503.01840) takes them."""
    return tuple(sorted({num_layers // 5, max(0, num_layers // 2 - 1), 3 * num_layers // 4}))


def write_data(
    target: Target, tokenizer: Any, request: Request, on_step: Callable[[int], None] | None = None
) -> int:
    """Generate the text of a run, or what is missing of it. Returns its number of tokens.

    Raises:
        FileNotFoundError, ValueError: see `read_prompts` and `Generator`.
    """
    if request.num_answers < 1:
        raise ValueError(f"the number of answers must be at least 1, not {request.num_answers}")
    if request.disk_budget is not None and not request.disk_budget > 0:
        raise ValueError(f"the disk budget must be positive, not {request.disk_budget / 1e9} GB")
    if request.text and request.prompts:
        raise ValueError(f"give --text {request.text} or --prompts {request.prompts}, not both")
    text = Text.load(request.text) if request.text else None
    prompts = read_prompts(request.prompts) if request.prompts else []
    excluded = read_excluded(request.exclude) if request.exclude else []
    layers = request.context_layers
    if layers is None:
        layers = default_context_layers(len(target.model.layers))
    recipe = Recipe(
        target.name,
        layers,
        rows=request.rows,
        max_tokens=request.max_tokens,
        seed=request.data_seed,
        prompts=_fingerprint(text.answers if text else prompts) if text or prompts else "self",
    )
    folder = request.out / "data"
    generator = Generator(target, tokenizer, folder, recipe, excluded, request.disk_budget)
    if text is not None:
        return generator.run_text(text, on_step)
    return generator.run(request.num_answers, prompts, on_step)


def _fingerprint(texts: list[Messages] | list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def make_trainer(target: Target, request: Request) -> Trainer:
    """The trainer of a run whose text is complete."""
    corpus = Corpus([request.out / "data"])
    if request.start_from is None:
        drafter = new_drafter(request.shape.config(target), target, corpus, request.settings.seed)
    else:
        drafter = load_recurrent(request.start_from, mx.float32)
        if drafter.config.quantization:
            raise ValueError(f"{request.start_from} is quantized: continue from the drafter it was made from")
        if request.vocabulary is not None:
            if drafter.config.head != "factored":
                raise ValueError(
                    f"{request.start_from} has a full head, made for the vocabulary it has: only a factored one "
                    f"can take another of {request.vocabulary} tokens"
                )
            choose_vocabulary(drafter, corpus, request.vocabulary or drafter.config.vocab_size)
        drafter.train()
        drafter.attach(target)
        drafter.freeze(keys=["d2t"], recurse=False)
        drafter.config = changed(drafter.config, calibration=())  # that of the old weights
    return Trainer(drafter, target, corpus, request.out, request.settings)


def to_float16(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """Round the drafter's weights to float16, in place. The file halves, and acceptance does not change."""
    drafter.update(
        tree_map(lambda a: a.astype(mx.float16) if a.dtype == mx.float32 else a, drafter.parameters())
    )
    return drafter


@dataclass(frozen=True, slots=True)
class Export:
    """Held-out tokens per step of a drafter before and after its weights were rounded, and its size."""

    before: float
    after: float
    bytes: int


def export(source: Path, out: Path, target: Target, corpus: Corpus, bits: int | None) -> Export:
    """Save the drafter of `source` in float16 or quantized, calibrated on held-out text, and measure what that costs.

    Args:
        bits: 4 or 8; None for float16.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    drafter = load_recurrent(source, mx.float32)
    drafter.train()  # its weights are not final
    drafter.attach(target)
    depths = int(drafter.config.training.get("objective", {}).get("depths", 4))
    settings = Settings()
    rows = target.output_rows(drafter.target_ids()).astype(mx.float32)

    def score() -> float:
        beam = Beam(1, depths + 1)
        return held_out(drafter, target.embed, corpus, beam, settings.validation_tokens).tokens_per_step

    before = score()
    if bits is None:
        to_float16(drafter)
    else:
        group_size = 64 if np.gcd(drafter.config.hidden_size, drafter.config.exit_dim) % 64 == 0 else 32
        quantization = {"bits": bits, "group_size": group_size}
        quantize(drafter, quantization)
        drafter.config = changed(drafter.config, quantization=quantization)
    after = score()
    if corpus.num_held_out:
        batches = corpus.held_out(settings.shape, CALIBRATION_POSITIONS)
        calibration = calibrate(drafter, target, rows, batches, depths)
        drafter.config = changed(drafter.config, calibration=calibration)
    card = source / "README.md"
    save_drafter(drafter, out, [(card.name, card.read_text())] if card.is_file() else [])
    return Export(before, after, weight_bytes(drafter))
