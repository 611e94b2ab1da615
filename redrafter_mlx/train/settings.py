"""How to train: the settings of one run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .corpus import WindowShape
from .loss import Objective

_POSITIVE = ("epochs", "learning_rate", "clip", "windows", "window", "validate_every", "validation_tokens")


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
        """Shape of a batch."""
        return WindowShape(self.windows, self.window, self.objective.depths)

    @property
    def positions(self) -> int:
        """Positions in a batch."""
        return self.windows * self.window

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        for name in ("warmup", "final_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.patience < 0:
            raise ValueError(f"patience must be 0 or more, not {self.patience}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"the seed must be between 0 and 2^64 - 1, not {self.seed}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts from."""

    model: str
    """The target as `--model` takes it; for the card."""
    start_from: str | None = None
    """Digest of the weights of the drafter that is trained on; None for a new one."""
    answers: int | None = None
    """Answers asked for; None where the text was given, or time decides."""


def identity(settings: Settings, origin: Origin) -> dict[str, Any]:
    """What of the options decides which weights come out; it is known before the target is."""
    values = {key: value for key, value in asdict(settings).items() if key not in ("patience", "objective")}
    return {
        **values,
        **asdict(settings.objective),
        "start_from": origin.start_from,
        "answers": origin.answers,
    }


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
