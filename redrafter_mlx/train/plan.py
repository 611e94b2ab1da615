"""What a run is told to the user as before it starts: how long it takes here, what it will bring, whether it pays."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redrafter_mlx.drafters.recurrent import DrafterConfig
from redrafter_mlx.files import new_file, read_json
from redrafter_mlx.target import Target

from .checkpoint import read_identity
from .curve import PAYS_FROM, positions_for
from .estimate import Estimate, TrainingSpeed, WritingSpeed, measure_training, measure_writing, operations
from .request import Inputs, Request
from .run import DATA
from .shards import list_shards, read_shard
from .tally import ANSWER_SHARE, Tally
from .verdict import judge_seconds

CLOCK = "clock.json"
TOY = 1e11
"""Floating-point operations below which a run takes seconds on any machine, so that nobody has to be kept from it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it starts, measured on this machine."""

    target: Target
    request: Request
    inputs: Inputs
    writing: WritingSpeed
    training: TrainingSpeed
    saved: tuple[int, int]
    """Answers and tokens that earlier calls have left."""

    @classmethod
    def measure(cls, target: Target, request: Request, inputs: Inputs) -> Plan:
        """Measure this machine; some seconds."""
        return cls(
            target,
            request,
            inputs,
            measure_writing(target, request.rows),
            measure_training(drafter_config(target, request, inputs), target, request.settings),
            saved_text(request.out / DATA),
        )

    @property
    def copies(self) -> int:
        """Drafters to export."""
        return 1 if self.request.bits is None else 2

    def estimate(self, answers: int | None = None) -> Estimate:
        """Of the run asked for, or of one with so many answers."""
        if answers is None and self.request.minutes is not None:
            answers = self._answers_in(60 * self.request.minutes)
        text = self.inputs.text
        if answers is None:
            answers = self.inputs.expected_answers(self.request)
        assert answers is not None
        there, tokens = self.saved
        missing = max(0, answers - there)
        if text is not None:
            positions: float = text.num_tokens
            writing = self.writing.states_seconds(max(0, text.num_tokens - tokens))
        else:
            positions = min(answers, there) * (tokens / max(1, there)) + missing * max(
                1.0, ANSWER_SHARE * self.request.max_tokens
            )
            recipe = self.request.recipe(self.target.name, (), "")
            writing = self.writing.seconds(missing, recipe, asks=not self.inputs.prompts)
        config = drafter_config(self.target, self.request, self.inputs)
        return Estimate(
            positions,
            writing,
            self.training.seconds(positions, self.request.settings),
            self.finishing_seconds(positions),
            operations(self.target, config, positions, self.request.settings),
        )

    def finishing_seconds(self, positions: float) -> float:
        """To export the drafter and to compare it with plain decoding."""
        exporting = self.training.finishing_seconds(positions, self.request.settings, self.copies)
        return exporting + judge_seconds(self.writing.step + self.writing.row)

    def _answers_in(self, seconds: float) -> int:
        """Answers that a run of so many seconds can have."""
        low, high = 1, 1
        most = len(self.inputs.prompts) or 10_000_000
        while high < most and self.estimate(high).seconds < seconds:
            low, high = high, 2 * high
        high = min(high, most)
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            low, high = (middle, high) if self.estimate(middle).seconds < seconds else (low, middle)
        return low

    def answers_that_pay(self) -> int:
        """The least number of answers from which a drafter begins to pay."""
        positions = positions_for(PAYS_FROM) / 0.95
        return max(1, round(positions / max(1.0, ANSWER_SHARE * self.request.max_tokens)))

    def warning(self, allow_small: bool) -> str | None:
        """What to say of a run that is too small to pay, if it goes on all the same; None if it is large enough.

        Raises:
            ValueError: it is too small, and neither a matter of seconds nor wanted so.
        """
        estimate = self.estimate()
        if self.inputs.start is not None or estimate.tokens_per_step >= PAYS_FROM:
            return None
        text = (
            f"this run is too small to pay: about {estimate.positions:,.0f} tokens of text make a drafter of about "
            f"{estimate.tokens_per_step:.2f} tokens per step, and below {PAYS_FROM} (about "
            f"{positions_for(PAYS_FROM):,} tokens) drafting hardly ever saves time"
        )
        if allow_small or estimate.work < TOY:
            return text
        answers = self.answers_that_pay()
        minutes = max(1, round(self.estimate(answers).seconds / 60))
        raise ValueError(
            f"{text}. Ask for more, such as --self-prompt {4 * answers} ({answers} at least, about {minutes} minutes "
            "here), or go on all the same with --allow-small"
        )


def drafter_config(target: Target, request: Request, inputs: Inputs) -> DrafterConfig:
    """The config of the drafter that a run trains."""
    return request.shape.config(target) if inputs.start is None else inputs.start.config


def has_checkpoint(out: Path) -> bool:
    """True if the run of a folder has trained already, so that its text is complete."""
    found = read_identity(out)
    return found is not None and found[0].step > 0


def saved_text(folder: Path) -> tuple[int, int]:
    """Answers and tokens of the shards that are there and whole."""
    answers = tokens = 0
    for path in list_shards(folder):
        try:
            text, _ = read_shard(path)
        except ValueError:
            continue
        answers, tokens = answers + len(text.prompts), tokens + len(text.tokens)
    return answers, tokens


class Deadline:
    """Ends the writing of a run with `minutes` so that what is left suffices to train on it.

    The working time of interrupted calls counts too; `clock.json` beside the text remembers it.
    """

    def __init__(self, plan: Plan) -> None:
        request = plan.request
        assert request.minutes is not None
        self._plan, self._total = plan, 60 * request.minutes
        self._path = request.out / DATA / CLOCK
        self._spent = 0.0
        if self._path.is_file():
            found = read_json(self._path).get("seconds")
            self._spent = float(found) if isinstance(found, (int, float)) else 0.0
        self._begun = self._saved_at = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block, also if it is interrupted."""
        self._begun = time.monotonic()
        try:
            yield
        finally:
            self._save()

    @property
    def elapsed(self) -> float:
        """Seconds of writing so far."""
        return self._spent + time.monotonic() - self._begun

    def left(self, tally: Tally) -> float:
        """Seconds of writing that are left, if what there is now is to be trained on."""
        plan = self._plan
        after = plan.training.seconds(tally.positions, plan.request.settings)
        return self._total - self.elapsed - after - plan.finishing_seconds(tally.positions)

    def is_over(self, tally: Tally) -> bool:
        """True once it is time to train."""
        if time.monotonic() - self._saved_at > 20:
            self._save()
        return self.left(tally) <= 0

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        with new_file(self._path) as part:
            part.write_text(json.dumps({"seconds": round(self.elapsed, 1)}) + "\n")
