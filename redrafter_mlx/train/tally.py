"""How far the writing of a run's text has got, and how much of it is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["questions", "answers", "states"]

QUESTION_TOKENS = 64
"""Tokens that a target spends on a usable question, assumed until the first ones are written: two thirds of the 80
that it may take, and one question in five is not usable."""
ANSWER_SHARE = 0.75
"""Share of its most tokens that an answer takes, assumed until the first ones are written. (In recipes/ answers of at
most 224 tokens have 160 in the mean.)"""


@dataclass(slots=True)
class Tally:
    """What is written. `saved_...` counts complete shards, those of an earlier process too; the rest is of this one."""

    wanted: int | None
    """Answers asked for; None where time decides how many."""
    max_tokens: int
    """Most tokens of an answer."""
    asks: bool
    """True if the target writes its questions too."""
    phase: Phase = "answers"
    saved_answers: int = 0
    saved_tokens: int = 0
    batch_size: int = 0
    """Questions or answers that are being written at the same time."""
    batch_ended: int = 0
    """Those of them that have ended."""
    batch_tokens: int = 0
    question_tokens: int = 0
    """Tokens spent on questions, usable or not."""
    usable_questions: int = 0
    finished_questions: int = 0
    """Questions written, usable or not."""
    answer_tokens: int = 0

    def begin(self, phase: Phase, size: int) -> None:
        """Begin a batch of `size` questions or answers."""
        self.phase, self.batch_size, self.batch_ended, self.batch_tokens = phase, size, 0, 0

    def step(self, tokens: int, ended: int) -> None:
        """Count a step of the batch: its tokens, and how many of its texts have ended by now."""
        self.batch_tokens += tokens
        self.batch_ended = ended
        if self.phase == "questions":
            self.question_tokens += tokens
        else:
            self.answer_tokens += tokens

    def end_questions(self, usable: int) -> None:
        """The batch of questions is complete, and so many of them can be used."""
        self.finished_questions += self.batch_size
        self.usable_questions += usable

    def save(self, answers: int, tokens: int) -> None:
        """A shard is complete, written now or found."""
        self.saved_answers += answers
        self.saved_tokens += tokens
        self.batch_size = self.batch_ended = self.batch_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens written by this process."""
        return self.question_tokens + self.answer_tokens

    @property
    def positions(self) -> int:
        """Tokens of answers there are to train on."""
        return self.saved_tokens + (self.batch_tokens if self.phase == "answers" else 0)

    @property
    def answer_mean(self) -> float:
        """Tokens of an answer: of those saved, or assumed."""
        if self.saved_answers:
            return self.saved_tokens / self.saved_answers
        return max(1.0, ANSWER_SHARE * self.max_tokens)

    @property
    def question_mean(self) -> float:
        """Tokens spent on a usable question: on those written, or assumed."""
        if not self.asks:
            return 0.0
        if self.finished_questions:
            return self.question_tokens / max(1, self.usable_questions)
        return float(QUESTION_TOKENS)

    @property
    def tokens_left(self) -> float:
        """Tokens that are still to be written, questions included; 0 where time decides."""
        if self.wanted is None:
            return 0.0
        answers = max(0, self.wanted - self.saved_answers)
        asked = min(answers, self.batch_size) if self.phase == "answers" else 0
        questions = (answers - asked) * self.question_mean
        return max(0.0, answers * self.answer_mean + questions - self.batch_tokens)
