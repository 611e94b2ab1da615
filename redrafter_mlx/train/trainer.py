"""Training a drafter on a corpus: AdamW, warm-up and cosine, checkpoints that resume exactly.

Everything random follows from (seed, epoch), so a run is a function of its corpus and settings; `last.safetensors`
holds weights, optimizer state and step, and a run that was stopped at any moment continues to the same weights. In a
folder: `last.safetensors`, `metrics.jsonl`, and the best drafter so far as `config.json`, `model.safetensors` and
README.md. Under `mlx.launch` every process takes its share of each batch's windows, and gradients are averaged.

Letters: as in `loss`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.drafters.recurrent import RecurrentDrafter, changed
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

from .card import card
from .checkpoint import (
    LAST,
    State,
    add_metrics,
    check_identity,
    cut_metrics,
    read_checkpoint,
    save_checkpoint,
)
from .corpus import Corpus
from .loss import Batch, batch_loss
from .replay import held_out
from .scaling import Scaling, Weights
from .settings import Origin, Progress, Settings, identity


def make_optimizer(settings: Settings, steps: int) -> optim.Optimizer:
    """AdamW whose learning rate rises over the warm-up and then falls as a cosine."""
    warm = max(1, int(settings.warmup * steps))
    peak = settings.learning_rate
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(peak / warm, peak, warm),
            optim.cosine_decay(peak, max(1, steps - warm), peak * settings.final_rate),
        ],
        [warm],
    )
    return optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=settings.weight_decay, bias_correction=True)


class Trainer:
    """One training run in one folder; `run` starts it or continues it.

    Args:
        origin: what the run starts from, which belongs to its identity.

    Raises:
        ValueError: the corpus or the checkpoint in `folder` belongs to another target or other settings; too little
            text.
    """

    def __init__(
        self,
        drafter: RecurrentDrafter,
        target: Target,
        corpus: Corpus,
        folder: Path,
        settings: Settings,
        origin: Origin | None = None,
    ) -> None:
        if corpus.context_size != drafter.config.context_size:
            raise ValueError(
                f"the data have contexts of size {corpus.context_size}, the drafter needs "
                f"{drafter.config.context_size}: use the data's context_layers"
            )
        corpus.check_enough(settings.shape)
        self.drafter, self.target, self.corpus = drafter, target, corpus
        self.folder, self.settings, self.origin = folder, settings, origin or Origin(target.name)
        self.batches = corpus.num_batches(settings.shape)
        self.steps = math.ceil(settings.epochs * self.batches)
        self.optimizer = make_optimizer(settings, self.steps)
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
        self.state = State()
        self.identity = {
            **identity(settings, self.origin),
            **self._shape(),
            "positions": corpus.num_positions,
        }
        """What decides which weights come out."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def _shape(self) -> dict[str, Any]:
        config = self.drafter.config
        names = ("exit_dim", "num_draft_layers", "head", "rnn", "draft_vocab_size", "context_layers")
        return {name: getattr(config, name) for name in names}

    def summary(self) -> str:
        """The size of the run in words, shown to the user before it starts."""
        settings, config = self.settings, self.drafter.config
        own = sum(a.size for a in dict(tree_flatten(self.weights)).values())
        depths = settings.objective.depths
        blocks = 4 * settings.positions * (2 * depths * config.draft_vocab + depths * 8 * config.exit_dim)
        # weights, the same folded, gradients, two moments, and the new ones of all while they replace these
        memory = 28 * own + 4 * self.rows.size + blocks
        return (
            f"{self.corpus.num_positions:,} positions, {self.steps:,} steps of {settings.positions}; "
            f"drafter of {own / 1e6:.2f} million parameters, its vocabulary of {config.draft_vocab:,} covers "
            f"{self.coverage:.1%} of the text; at most {memory / 1e9:.1f} GB besides the target"
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
        state, end = self.state, self.steps
        if stop_after is not None:
            end = min(end, state.step + stop_after)
        loss_and_grad = mx.value_and_grad(self._loss)
        begun, begun_at = time.perf_counter(), state.step
        if state.step == 0 and not state.acceptance:
            self._validate(math.nan)
        for batch in self._remaining():
            if state.step >= end:
                break
            loss, gradients = loss_and_grad(self.weights, batch)
            gradients = nn.utils.average_gradients(gradients)
            gradients, _ = optim.clip_grad_norm(gradients, self.settings.clip)
            updated = self.optimizer.apply_gradients(gradients, self.weights)
            mx.eval(updated, self.optimizer.state, loss)
            value = float(np.array(mx.distributed.all_sum(loss))) / self.group.size()
            if not math.isfinite(value):
                raise ValueError(self._not_finite(value, batch))
            self.weights = updated
            state.step += 1
            elapsed = time.perf_counter() - begun
            if state.step % self.settings.validate_every == 0 or state.step == self.steps:
                state.seconds += elapsed
                self._validate(value)
                begun, begun_at, elapsed = time.perf_counter(), state.step, 0.0
                if 0 < self.settings.patience <= state.stale:
                    break
            if on_progress is not None:
                on_progress(self._progress(value, elapsed, state.step - begun_at))
        return state.best

    def _not_finite(self, loss: float, batch: Batch) -> str:
        """What to say of a loss that is not a number."""
        if not mx.all(mx.isfinite(batch.contexts)).item():
            return (
                f"the loss became {loss} at step {self.step}: the hidden states of the text hold values that are not "
                f"finite; delete {self.folder / 'data'} to write it anew"
            )
        return (
            f"the loss became {loss} at step {self.step}: try a smaller learning rate than "
            f"{self.settings.learning_rate} (--learning-rate), and delete {self.folder / LAST} first, which belongs "
            "to this one (the text is kept)"
        )

    def _loss(self, weights: Weights, batch: Batch) -> mx.array:
        self.drafter.update(self.scaling.fold(weights))
        return batch_loss(self.drafter, batch, self.target.embed, self.rows, self.settings.objective)

    def _progress(self, loss: float, elapsed: float, steps: int) -> Progress:
        state = self.state
        rate = steps / elapsed if steps else state.step / max(state.seconds, 1e-9)
        left = (self.steps - state.step) / rate if rate else math.inf
        return Progress(state.step, self.steps, loss, rate * self.settings.positions, left, state.acceptance)

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
        s, state = self.settings, self.state
        self.drafter.update(self.scaling.fold(self.weights))
        mx.eval(self.drafter.parameters())
        beam = Beam(1, s.objective.depths + 1)
        found = held_out(self.drafter, self.target.embed, self.corpus, beam, s.validation_tokens)
        state.acceptance, score = found.acceptance, found.tokens_per_step
        state.stale += 1
        is_best = score > state.best or not found.steps
        if is_best:
            state.best, state.stale = score, 0
        if self.group.rank():
            return
        record = {
            "step": state.step,
            "steps": self.steps,
            "positions": state.step * s.positions,
            "loss": None if math.isnan(loss) else loss,
            "tokens_per_step": score,
            "held_out_steps": found.steps,
            "acceptance": state.acceptance,
            "learning_rate": self.optimizer.learning_rate.item(),
            "seconds": round(state.seconds, 1),
        }
        if is_best:
            self._save_best(record)
        add_metrics(self.folder, record)
        save_checkpoint(self.folder, state, self.identity, self.weights, self.optimizer.state)

    def _save_best(self, record: dict[str, Any]) -> None:
        training = {
            **({"earlier": self.earlier} if self.earlier else {}),
            **{k: v for k, v in asdict(self.settings).items() if k not in ("validate_every", "patience")},
            "positions": self.corpus.num_positions,
            "vocabulary_coverage": round(self.coverage, 4),
            "step": record["step"],
            "steps": self.steps,
            "held_out_tokens_per_step": round(record["tokens_per_step"], 4),
            "held_out_steps": record["held_out_steps"],
            "acceptance": [round(share, 4) for share in record["acceptance"]],
        }
        self.drafter.config = changed(self.drafter.config, training=training)
        text = card(self.drafter.config, self.origin.model, str(self.folder.resolve()))
        save_drafter(self.drafter, self.folder, [("README.md", text)])

    def _resume(self) -> None:
        """Take over the checkpoint of the folder. One of other settings is refused, unless no step was taken yet."""
        found = read_checkpoint(self.folder)
        if found is not None:
            try:
                check_identity(self.folder, found.identity, self.identity)
            except ValueError:
                if found.state.step:
                    raise
                found = None
        if not self.group.rank():
            cut_metrics(self.folder, None if found is None else found.state.step)
        if found is not None:
            self.weights, self.optimizer.state = found.weights, found.optimizer
            self.state = found.state


def _runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The earlier runs of a drafter, oldest first, each with its main settings."""
    if not training:
        return []
    last = {key: training.get(key) for key in ("positions", "epochs", "learning_rate", "windows", "seed")}
    return [*training.get("earlier", []), last]
