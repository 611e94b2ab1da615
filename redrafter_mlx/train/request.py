"""What one training run is asked to do, and the files it names: all of it is checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.kinds import WEIGHTS, load_recurrent
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.target import Target

from .checkpoint import check_identity, read_identity
from .history import read_history
from .prompts import Messages, read_excluded, read_prompts
from .recipe import Recipe
from .settings import Origin, Settings, identity
from .shards import SavedAnswers

MOST_WIDTH, MOST_BLOCKS = 65_536, 64
"""Of a drafter; far beyond what can pay, so that a slip of the keyboard does not fill the memory."""


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

    def __post_init__(self) -> None:
        if self.exit_dim is not None and not 1 <= self.exit_dim <= MOST_WIDTH:
            raise ValueError(f"exit_dim must be between 1 and {MOST_WIDTH}, not {self.exit_dim}")
        if not 0 <= self.num_draft_layers <= MOST_BLOCKS:
            raise ValueError(
                f"the number of residual blocks must be between 0 and {MOST_BLOCKS}, not {self.num_draft_layers}"
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size < 1:
            raise ValueError(f"draft_vocab_size must be at least 1, not {self.draft_vocab_size}")

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


@dataclass(frozen=True, slots=True)
class Request:
    """What one training run is asked to do.

    Raises:
        ValueError: an option that cannot be, or two that exclude each other.
    """

    out: Path
    """Folder of the drafter, its checkpoints and, under `data`, its text."""
    model: str = ""
    """The target as `--model` takes it; for the card. Empty: the target's name."""
    prompts: Path | None = None
    """File or folder of prompts; None: the target writes its own."""
    text: Path | None = None
    """Answers that the target generated before (see `SavedAnswers`), used instead of new ones."""
    from_history: Path | None = None
    """Folder of a history of one's own use, whose answers are used instead of new ones."""
    num_answers: int | None = 1000
    """Number of answers to generate; with `prompts`, at most one per prompt; with `text`, the first ones of it. None:
    as many as `minutes` allow, or as the text has."""
    minutes: float | None = None
    """Working time of the whole run, in minutes, that decides how much text is written. None: `num_answers` does."""
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
    bits: int | None = None
    """4 or 8: also export a quantized copy."""
    shape: Shape = field(default_factory=Shape)
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self._check_amount()
        for name, value in (("--minutes", self.minutes), ("the disk budget", self.disk_budget)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if self.start_from is not None and self.start_from.resolve() == self.out.resolve():
            raise ValueError(f"--start-from and --out must be different folders, not both {self.out}")
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}")
        if self.vocabulary is not None and self.vocabulary < 0:
            raise ValueError(f"--draft-vocab must be 0 (all) or more, not {self.vocabulary}")
        layers = self.context_layers or ()
        if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"context_layers must be different and 0 or more, not {list(layers)}")
        self.recipe("", layers, "")  # checks the rest

    def _check_amount(self) -> None:
        """Check that one thing decides how much text there is."""
        options = (("--text", self.text), ("--from-history", self.from_history), ("--prompts", self.prompts))
        given = [f"{name} {path}" for name, path in options if path is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
        if self.has_text and self.minutes is not None:
            raise ValueError(f"--minutes decides how much text is written, and {given[0]} gives it")
        if self.num_answers is not None and self.num_answers < 1:
            raise ValueError(f"the number of answers must be at least 1, not {self.num_answers}")
        if self.minutes is not None and self.num_answers is not None:
            raise ValueError("give a number of answers (--self-prompt) or a time (--minutes), not both")
        if self.num_answers is None and self.minutes is None and not self.has_text:
            raise ValueError("how much text to write must be given: --self-prompt or --minutes")

    @property
    def has_text(self) -> bool:
        """True if no text is to be written."""
        return self.text is not None or self.from_history is not None

    def recipe(self, target: str, layers: tuple[int, ...], prompts: str) -> Recipe:
        """How the text is generated."""
        return Recipe(
            target, layers, rows=self.rows, max_tokens=self.max_tokens, seed=self.data_seed, prompts=prompts
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that a request names, read."""

    prompts: list[Messages]
    text: SavedAnswers | None
    excluded: list[str]
    start: RecurrentDrafter | None
    """The drafter to continue from; not attached."""
    origin: Origin

    @classmethod
    def read(cls, request: Request) -> Inputs:
        """Read and check everything that can be checked without the target.

        Raises:
            FileNotFoundError, ValueError: a file that is missing or wrong; a folder of another run; so little text that
                it cannot fill a batch.
        """
        prompts = read_prompts(request.prompts) if request.prompts else []
        text = SavedAnswers.load(request.text).first(request.num_answers) if request.text else None
        excluded = read_excluded(request.exclude) if request.exclude else []
        if request.from_history is not None and not request.from_history.is_dir():
            raise FileNotFoundError(f"--from-history: no folder {request.from_history}")
        start = None if request.start_from is None else _read_start(request)
        digest = None if request.start_from is None else _digest(request.start_from / WEIGHTS)
        origin = Origin(request.model, digest, request.num_answers)
        found = read_identity(request.out)
        if found is not None and found[0].step:
            check_identity(request.out, found[1], identity(request.settings, origin))
        inputs = cls(prompts, text, excluded, start, origin)
        inputs._check_enough(request)
        return inputs

    def with_history(self, request: Request, target: Target, tokenizer: Any) -> Inputs:
        """With the answers of the request's history, which belongs to a target; as it is where none is asked for.

        Raises:
            FileNotFoundError, ValueError: see `read_history`; so little text that it cannot fill a batch.
        """
        if request.from_history is None:
            return self
        text = read_history(request.from_history, target, tokenizer).first(request.num_answers)
        found = replace(self, text=text)
        found._check_enough(request)
        return found

    def expected_answers(self, request: Request) -> int | None:
        """Answers that the run will have, at most; None where time decides."""
        if self.text is not None:
            return len(self.text.tokens)
        if self.prompts:
            return min(len(self.prompts), request.num_answers or len(self.prompts))
        return request.num_answers

    def _check_enough(self, request: Request) -> None:
        """Refuse a run whose text cannot fill one batch, before any of it is written."""
        answers = self.expected_answers(request)
        if answers is None or (request.from_history is not None and self.text is None):
            return
        most = answers * request.max_tokens if self.text is None else self.text.num_tokens
        needed = request.settings.positions
        if most < needed:
            raise ValueError(
                f"there is too little text to train on: {answers} answers have at most {most} tokens, and one batch "
                f"takes {needed} (--batch). Ask for more answers (--self-prompt, --prompts); 100,000 tokens make a "
                "drafter that helps"
            )

    def fingerprint(self) -> str:
        """What a recipe keeps of the prompts or the text given."""
        given = self.text.tokens if self.text is not None else self.prompts
        if not given:
            return "self"
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _read_start(request: Request) -> RecurrentDrafter:
    source = request.start_from
    assert source is not None
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"--start-from: no drafter at {source}")
    drafter = load_recurrent(source, mx.float32)
    if drafter.config.quantization:
        raise ValueError(f"{source} is quantized: continue from the drafter it was made from")
    if request.vocabulary is not None and drafter.config.head != "factored":
        raise ValueError(
            f"{source} has a full head, made for the vocabulary it has: only a factored one "
            f"can take another of {request.vocabulary} tokens"
        )
    drafter.train()  # its weights are not final
    return drafter


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
