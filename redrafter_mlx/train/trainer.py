"""Training a drafter on a corpus: AdamW, warm-up and cosine, checkpoints that resume exactly.

Everything random follows from (seed, epoch), so a run is a function of its corpus and settings; `last.safetensors`
holds weights, optimizer state and step, and a run that was stopped at any moment continues to the same weights. In a
folder: `last.safetensors`, `metrics.jsonl`, and the best drafter so far as `config.json`, `model.safetensors` and
README.md. Under `mlx.launch` every process takes its share of each batch's windows, and gradients are averaged.

Letters: as in `loss`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter, changed
from redrafter_mlx.files import new_file, read_safetensors, write_safetensors
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

from .card import card
from .corpus import Corpus, WindowShape
from .loss import Batch, Objective, batch_loss
from .replay import held_out
from .scaling import Scaling, Weights, init_weights

LAST, METRICS = "last.safetensors", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train."""

    epochs: float = 2.0
    learning_rate: float = 1e-3
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises."""
    final_rate: float = 0.0
    """Learning rate at the end, as a share of its peak; above 0 for a run that another one continues."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Upper bound on the norm of the gradient."""
    windows: int = 8
    """Windows in a batch."""
    window: int = 32
    """Positions in a window."""
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    validate_every: int = 200
    """Steps between validations, each with a checkpoint."""
    validation_tokens: int = 2000
    """Tokens of held-out answers that a validation decodes with the drafter."""
    patience: int = 0
    """Validations without improvement before stopping early; 0: never."""

    @property
    def shape(self) -> WindowShape:
        return WindowShape(self.windows, self.window, self.objective.depths)

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "clip", "windows", "window", "validate_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "final_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training run has got."""

    step: int
    steps: int
    loss: float
    positions_per_second: float
    seconds_left: float
    acceptance: tuple[float, ...] = ()
    """share of decode steps on held-out text in which the guesses up to each depth were accepted, last validation"""

    @property
    def tokens_per_step(self) -> float:
        return 1 + sum(self.acceptance)


def new_drafter(config: DrafterConfig, target: Target, corpus: Corpus, seed: int = 0) -> RecurrentDrafter:
    """A drafter before training, attached to its target. A reduced vocabulary has the corpus' most common tokens."""
    mx.random.seed(seed)
    drafter = RecurrentDrafter(config)
    if config.draft_vocab_size is not None:
        choose_vocabulary(drafter, corpus, config.draft_vocab_size)
    init_weights(drafter, Scaling.of(corpus, target))
    mx.eval(drafter.parameters())
    drafter.attach(target)
    return drafter


def choose_vocabulary(drafter: RecurrentDrafter, corpus: Corpus, size: int) -> None:
    """Make the `size` most common tokens of the corpus the drafter's vocabulary; attach the drafter afterwards.

    The rows of a full head are not moved, so a drafter whose full head was trained must keep its vocabulary.
    """
    drafter.config = changed(drafter.config, draft_vocab_size=size)
    counts = corpus.token_counts(drafter.config.vocab_size)
    ids = np.argsort(-counts, kind="stable")[:size]
    drafter.d2t = mx.array(ids - np.arange(len(ids)), dtype=mx.int32)
    drafter.freeze(keys=["d2t"], recurse=False)


class Trainer:
    """One training run in one folder; `run` starts it or continues it.

    Raises:
        ValueError: the corpus or the checkpoint in `folder` belongs to another target or other settings.
    """

    def __init__(
        self,
        drafter: RecurrentDrafter,
        target: Target,
        corpus: Corpus,
        folder: Path,
        settings: Settings,
    ) -> None:
        if corpus.context_size != drafter.config.context_size:
            raise ValueError(
                f"the data have contexts of size {corpus.context_size}, the drafter needs "
                f"{drafter.config.context_size}: use the data's context_layers"
            )
        self.drafter, self.target, self.corpus = drafter, target, corpus
        self.folder, self.settings = folder, settings
        self.batches = corpus.num_batches(settings.shape)
        self.steps = max(1, math.ceil(settings.epochs * self.batches))
        warm = max(1, int(settings.warmup * self.steps))
        peak = settings.learning_rate
        schedule = optim.join_schedules(
            [
                optim.linear_schedule(peak / warm, peak, warm),
                optim.cosine_decay(peak, max(1, self.steps - warm), peak * settings.final_rate),
            ],
            [warm],
        )
        self.optimizer = optim.AdamW(
            schedule, betas=[0.9, 0.98], weight_decay=settings.weight_decay, bias_correction=True
        )
        self.scaling = Scaling.of(corpus, target)
        self.weights: Weights = self.scaling.unfold(drafter.trainable_parameters())
        """The weights that the optimizer updates; the drafter holds them folded."""
        self.optimizer.init(self.weights)
        self.rows = target.output_rows(drafter.target_ids()).astype(mx.float32)
        self.earlier = _runs(drafter.config.training)
        """The runs in which this drafter was trained before."""
        ids = drafter.target_ids()
        counts = corpus.token_counts(drafter.config.vocab_size)
        self.coverage = 1.0 if ids is None else float(counts[np.array(ids)].sum() / counts.sum())
        """Share of the text that the drafter's vocabulary covers."""
        self.group = mx.distributed.init()
        self.step = 0
        self.best = -1.0
        self.stale = 0
        self.last_acceptance: tuple[float, ...] = ()
        self.seconds = 0.0

    def estimate(self) -> str:
        """The size of the run in words, shown to the user before it starts."""
        settings, config = self.settings, self.drafter.config
        own = sum(a.size for a in dict(tree_flatten(self.weights)).values())
        positions = settings.windows * settings.window
        depths = settings.objective.depths
        blocks = 4 * positions * (2 * depths * config.draft_vocab + depths * 8 * config.exit_dim)
        # weights, the same folded, gradients, two moments, and the new ones of all while they replace these
        memory = 28 * own + 4 * self.rows.size + blocks
        flops = positions * (6 * depths * own + (4 * depths + 2) * self.rows.size)
        return (
            f"{self.corpus.num_positions} positions, {self.steps} steps of {positions}; "
            f"drafter {own / 1e6:.2f} M parameters, its vocabulary of {config.draft_vocab} covers "
            f"{self.coverage:.1%} of the text; at most {memory / 1e9:.1f} GB besides the "
            f"target; {self.steps * flops / 1e12:.1f} TFLOP "
            f"({self.steps * flops / 6e12:.0f} min at 100 GFLOP/s)"
        )

    def run(
        self, on_progress: Callable[[Progress], None] | None = None, stop_after: int | None = None
    ) -> float:
        """Train to the end, or for `stop_after` steps. Returns the best held-out tokens per step.

        Raises:
            ValueError: the loss is no longer finite; the last checkpoint is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        loss_and_grad = mx.value_and_grad(self._loss)
        begun, begun_at, target_step = time.perf_counter(), self.step, self.steps
        if stop_after is not None:
            target_step = min(self.steps, self.step + stop_after)
        if self.step == 0 and not self.last_acceptance:
            self._validate(math.nan)
        for batch in self._remaining():
            if self.step >= target_step:
                break
            loss, gradients = loss_and_grad(self.weights, batch)
            gradients = nn.utils.average_gradients(gradients)
            gradients, _ = optim.clip_grad_norm(gradients, self.settings.clip)
            updated = self.optimizer.apply_gradients(gradients, self.weights)
            mx.eval(updated, self.optimizer.state, loss)
            value = float(np.array(mx.distributed.all_sum(loss))) / self.group.size()
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss became {value} at step {self.step}: try a smaller learning rate "
                    f"than {self.settings.learning_rate}; the checkpoint in {self.folder} is kept"
                )
            self.weights = updated
            self.step += 1
            elapsed = time.perf_counter() - begun
            if self.step % self.settings.validate_every == 0 or self.step == self.steps:
                self.seconds += elapsed
                self._validate(value)
                begun, begun_at, elapsed = time.perf_counter(), self.step, 0.0
                if 0 < self.settings.patience <= self.stale:
                    break
            if on_progress is not None:
                on_progress(self._progress(value, elapsed, self.step - begun_at))
        return self.best

    def _loss(self, weights: Weights, batch: Batch) -> mx.array:
        self.drafter.update(self.scaling.fold(weights))
        return batch_loss(self.drafter, batch, self.target.embed, self.rows, self.settings.objective)

    def _progress(self, loss: float, elapsed: float, steps: int) -> Progress:
        rate = steps / elapsed if steps else self.step / max(self.seconds, 1e-9)
        positions = self.settings.windows * self.settings.window
        left = (self.steps - self.step) / rate if rate else math.inf
        return Progress(self.step, self.steps, loss, rate * positions, left, self.last_acceptance)

    def _remaining(self) -> Iterator[Batch]:
        """The batches from the current step on, of each the share of this process."""
        s, rank, size = self.settings, self.group.rank(), self.group.size()
        while self.step < self.steps:
            epoch, skip = divmod(self.step, self.batches)
            batches = self.corpus.epoch(epoch, s.seed, s.shape, skip)
            for batch in batches:
                if size > 1:
                    batch = s.objective.share(batch, rank, size)
                yield batch

    def _validate(self, loss: float) -> None:
        """Measure, write the metrics and both checkpoints."""
        s, depths = self.settings, self.settings.objective.depths
        self.drafter.update(self.scaling.fold(self.weights))
        mx.eval(self.drafter.parameters())
        beam = Beam(1, depths + 1)
        found = held_out(self.drafter, self.target.embed, self.corpus, beam, s.validation_tokens)
        self.last_acceptance, score = found.acceptance, found.tokens_per_step
        self.stale += 1
        is_best = score > self.best or not found.steps
        if is_best:
            self.best, self.stale = score, 0
        if self.group.rank():
            return
        record = {
            "step": self.step,
            "steps": self.steps,
            "positions": self.step * s.windows * s.window,
            "loss": None if math.isnan(loss) else loss,
            "tokens_per_step": score,
            "held_out_steps": found.steps,
            "acceptance": self.last_acceptance,
            "learning_rate": self.optimizer.learning_rate.item(),
            "seconds": round(self.seconds, 1),
        }
        if is_best:
            self._save_best(record)
        self._save_last()
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _save_best(self, record: dict[str, Any]) -> None:
        training = {
            **({"earlier": self.earlier} if self.earlier else {}),
            **{k: v for k, v in asdict(self.settings).items() if k not in ("validate_every", "patience")},
            "positions": self.corpus.num_positions,
            "vocabulary_coverage": round(self.coverage, 4),
            "step": record["step"],
            "held_out_tokens_per_step": round(record["tokens_per_step"], 4),
        }
        self.drafter.config = changed(self.drafter.config, training=training)
        save_drafter(self.drafter, self.folder, [("README.md", card(self.drafter.config, record))])

    def _save_last(self) -> None:
        named = {"weights": self.weights, "optimizer": self.optimizer.state}
        arrays = dict(tree_flatten(named))
        state = {
            "step": self.step, "best": self.best, "stale": self.stale, "seconds": self.seconds,
            "acceptance": self.last_acceptance, "fingerprint": self._fingerprint(),
        }  # fmt: skip
        with new_file(self.folder / LAST) as path:
            write_safetensors(path, arrays, {"state": json.dumps(state)})

    def _fingerprint(self) -> str:
        """The settings and data that a checkpoint and the run that continues it must have in common."""
        own = {k: v for k, v in asdict(self.settings).items() if k != "patience"}
        return json.dumps({**own, "positions": self.corpus.num_positions}, sort_keys=True)

    def _resume(self) -> None:
        path = self.folder / LAST
        if not path.is_file():
            return
        read_safetensors(path)  # checks that it is whole
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        state = json.loads(metadata["state"])
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"{path} was written with other settings or data: {state['fingerprint']}, "
                f"now {self._fingerprint()}; use another folder"
            )
        named: Any = tree_unflatten(list(arrays.items()))
        self.weights, self.optimizer.state = named["weights"], named["optimizer"]
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        self.seconds, self.last_acceptance = state["seconds"], tuple(state["acceptance"])


def _runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The earlier runs of a drafter, oldest first, each with its main settings."""
    if not training:
        return []
    last = {key: training.get(key) for key in ("positions", "epochs", "learning_rate", "windows", "seed")}
    return [*training.get("earlier", []), last]
