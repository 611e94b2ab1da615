"""What a batch of texts is made of: a prompt to continue, the answer to it, and when an answer has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW, REPEATS = 8, 12


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt to continue, and how."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_k: int = 0
    """0: the whole vocabulary."""


@dataclass(slots=True)
class Answer:
    """What the target generated after a prompt: `contexts[j]` is the state in which it chose `tokens[j]`."""

    tokens: list[int] = field(default_factory=list)
    """n tokens; the last one is the stop token if the answer ended with one"""
    contexts: list[np.ndarray] = field(default_factory=list)
    """n arrays (C,) float16; empty if they were not requested"""
    stopped: bool = False
    """True if the answer ended with a stop token, not by its length or in a loop."""


class LoopWatch:
    """Detects a text that repeats itself: 12 windows of 8 tokens in a row that all occurred before.

    Small models that decode greedily soon do this, and a drafter trained on such text would learn little else.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._last: list[int] = []
        self._run = 0

    def push(self, token: int) -> bool:
        """Add a token; True once the text loops."""
        self._last = [*self._last[-(WINDOW - 1) :], token]
        if len(self._last) == WINDOW:
            window = tuple(self._last)
            self._run = self._run + 1 if window in self._seen else 0
            self._seen.add(window)
        return self._run >= REPEATS


def loop_start(tokens: Sequence[int]) -> int:
    """How many tokens of a text to keep: all, or those up to the one with which it is found to loop."""
    watch = LoopWatch()
    for index, token in enumerate(tokens):
        if watch.push(token):
            return index + 1
    return len(tokens)


class Writing:
    """The answer to one row while it is being written.

    Args:
        begun: what an interrupted batch has written of it.
    """

    def __init__(self, row: Row, stop: frozenset[int], cut_loops: bool, begun: Answer | None = None) -> None:
        self.row, self.answer, self.is_done = row, Answer(), False
        self._stop, self._watch = stop, LoopWatch() if cut_loops else None
        if begun is not None:
            for index, token in enumerate(begun.tokens):
                self.push(token, begun.contexts[index] if begun.contexts else None)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and what follows it so far."""
        return (*self.row.prompt, *self.answer.tokens)

    def push(self, token: int, context: np.ndarray | None) -> None:
        """Add the next token of the answer, and the context (C,) it was chosen in where contexts are kept."""
        answer = self.answer
        answer.tokens.append(token)
        if context is not None:
            answer.contexts.append(context)
        answer.stopped = token in self._stop
        looped = self._watch is not None and self._watch.push(token)
        self.is_done = answer.stopped or looped or len(answer.tokens) >= self.row.max_tokens
