"""How long a run will take on this machine, measured on a few steps before it starts.

Writing: a step of B texts takes a + b B seconds, so two batch sizes give both. Training, validation and calibration:
one of each on random numbers, which take as long as others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.files import weight_bytes
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

from .calibrate import calibrate
from .corpus import HELD_OUT_EVERY
from .curve import expected_tokens_per_step
from .export import CALIBRATION_POSITIONS
from .generate import sample
from .loss import Batch, batch_loss
from .prompts import MAX_PROMPT_TOKENS
from .recipe import Recipe
from .replay import replay
from .settings import Settings
from .tally import ANSWER_SHARE, QUESTION_TOKENS

PROBE_SECONDS = 2.0
PROMPT_TOKENS = 48
"""Of a question in its chat template."""


@dataclass(frozen=True, slots=True)
class WritingSpeed:
    """Seconds of one step of B texts: `step` + B x `row`."""

    step: float
    row: float

    def seconds(self, answers: int, recipe: Recipe, asks: bool) -> float:
        """To write so many answers, and the questions if the target `asks` itself."""
        batches = answers / recipe.rows
        tokens = PROMPT_TOKENS + ANSWER_SHARE * recipe.max_tokens + (QUESTION_TOKENS if asks else 0)
        steps = recipe.max_tokens + PROMPT_TOKENS + (2 * MAX_PROMPT_TOKENS if asks else 0)
        return math.ceil(batches) * steps * self.step + answers * tokens * self.row

    def states_seconds(self, tokens: int) -> float:
        """To compute the states of given answers, prompts included."""
        return 1.3 * tokens * self.row


@dataclass(frozen=True, slots=True)
class TrainingSpeed:
    """Seconds of the parts of training."""

    step: float
    decode: float
    """Of one decode step of a validation."""
    calibrate: float
    """Of one batch of positions."""

    def seconds(self, positions: float, settings: Settings) -> float:
        """To train on so many positions, with all validations."""
        steps = settings.epochs * positions * (1 - 1 / HELD_OUT_EVERY) / settings.positions
        return steps * self.step + (steps // settings.validate_every + 2) * self._validation(
            positions, settings
        )

    def finishing_seconds(self, positions: float, settings: Settings, copies: int) -> float:
        """To export so many copies of the drafter."""
        batches = math.ceil(min(_held_out(positions), CALIBRATION_POSITIONS) / settings.positions)
        return copies * (2 * self._validation(positions, settings) + batches * self.calibrate)

    def _validation(self, positions: float, settings: Settings) -> float:
        tokens = min(settings.validation_tokens, _held_out(positions))
        return tokens / expected_tokens_per_step(positions) * self.decode


def _held_out(positions: float) -> float:
    """Tokens of held-out greedy answers in so much text."""
    return Recipe("").greedy * positions / HELD_OUT_EVERY


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take and bring."""

    positions: float
    writing: float
    """Seconds."""
    training: float
    finishing: float
    work: float
    """Floating-point operations of writing and training, about."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.writing + self.training + self.finishing

    @property
    def tokens_per_step(self) -> float:
        """To expect of the drafter, by the measured curve."""
        return expected_tokens_per_step(self.positions * (1 - 1 / HELD_OUT_EVERY))


def measure_writing(target: Target, rows: int) -> WritingSpeed:
    """Time a few steps of `rows` texts and of an eighth of them."""
    few = max(1, rows // 8)
    many, little = _step_seconds(target, rows), _step_seconds(target, few)
    row = max(0.0, (many - little) / (rows - few)) if rows > few else 0.0
    return WritingSpeed(max(0.0, many - rows * row), row)


def _step_seconds(target: Target, rows: int) -> float:
    cache = make_prompt_cache(target.model)
    rng = np.random.default_rng(0)
    temperatures = np.where(np.arange(rows) % 5 < 2, 0.8, 0.0)

    def step() -> None:
        tokens = mx.array(rng.integers(target.vocab_size, size=(rows, 1)).astype(np.int32))
        logits, contexts = target.forward(tokens, cache)
        last = logits[:, -1].astype(mx.float32)
        mx.eval(last, contexts)
        sample(np.array(last), temperatures, 0, rng.random(rows))

    return mean_seconds(step, PROBE_SECONDS)


def mean_seconds(work: Callable[[], None], seconds: float, most: int = 8) -> float:
    """Mean time of `work`, done once to warm up, then until `seconds` have passed or `most` times."""
    work()
    begun, count = time.perf_counter(), 0
    while count < most and (not count or time.perf_counter() - begun < seconds):
        work()
        count += 1
    return (time.perf_counter() - begun) / count


def measure_training(config: DrafterConfig, target: Target, settings: Settings) -> TrainingSpeed:
    """Time a training step, a decode step of validation and a batch of calibration, on random numbers."""
    mx.random.seed(settings.seed)
    drafter = RecurrentDrafter(config)
    drafter.attach(target)
    drafter.freeze(keys=["d2t"], recurse=False)
    rows = target.output_rows(drafter.target_ids()).astype(mx.float32)
    depths = settings.objective.depths
    shape = (settings.windows, settings.window + depths)
    batch = Batch(
        mx.random.normal((*shape, config.context_size)),
        mx.random.randint(0, config.vocab_size, shape).astype(mx.int32),
        mx.full((settings.windows, settings.window), depths, dtype=mx.int32),
    )
    optimizer = optim.AdamW(1e-6)
    weights = drafter.trainable_parameters()
    optimizer.init(weights)

    def loss(weights: object) -> mx.array:
        drafter.update(weights)  # type: ignore[arg-type]
        return batch_loss(drafter, batch, target.embed, rows, settings.objective)

    gradient = mx.value_and_grad(loss)

    def step() -> None:
        nonlocal weights
        value, gradients = gradient(weights)
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(value, weights, optimizer.state)

    step_seconds = mean_seconds(step, PROBE_SECONDS)
    drafter.update(weights)
    contexts = np.array(batch.contexts).reshape(-1, config.context_size)
    tokens = np.array(batch.tokens).reshape(-1).tolist()
    decoding = replay(drafter.frozen(), target.embed, contexts, tokens, Beam(1, depths + 1))
    decode_seconds = mean_seconds(lambda: _next(decoding), PROBE_SECONDS / 4)
    begun = time.perf_counter()
    calibrate(drafter, target, rows, [batch], depths)
    return TrainingSpeed(step_seconds, decode_seconds, time.perf_counter() - begun)


def _next(steps: object) -> None:
    next(steps, None)  # type: ignore[call-overload]


def operations(target: Target, config: DrafterConfig, positions: float, settings: Settings) -> float:
    """Floating-point operations of writing and training on so many positions, about."""
    parameters = weight_bytes(target.model) / 4
    drafter = config.exit_dim * (config.context_size + (1 + config.num_draft_layers) * config.exit_dim)
    drafter += config.hidden_size * (config.draft_vocab + 2 * config.hidden_size)
    return positions * (2 * parameters + 6 * settings.objective.depths * settings.epochs * drafter)
