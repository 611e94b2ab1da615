"""From tokens to text as it streams: whole characters, ended by a stop string.

The text of a stream is what prompt and answer together decode to, minus what the prompt decodes to: so a first space is
kept, whatever a tokenizer does at the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded with the first ones of the answer; more than a character's bytes."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that is needed."""

    def decode(self, tokens: list[int]) -> str: ...


class TextStream:
    """Turns tokens into text piece by piece.

    Bytes of an unfinished character wait for the rest, and so does text that may be the beginning of a stop string.

    Args:
        prompt: the tokens before the first one that will be added.
    """

    def __init__(
        self, tokenizer: Decoder | None, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._begin, self._end = 0, len(self._tokens)  # what lies before `_end` is text already
        self._stop = list(stop)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with `token`; sets `stopped` when a stop string is complete."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        before, now = self._decoded(self._end), self._decoded(len(self._tokens))
        if now.endswith(_UNFINISHED) and len(self._tokens) - self._end < CONTEXT_TOKENS:
            return ""  # in the middle of a character, unless it is one that was never whole
        self._begin, self._end = self._end, len(self._tokens)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What was still held back."""
        if self._tokenizer is None:
            return ""
        before, now = self._decoded(self._end), self._decoded(len(self._tokens))
        self._begin = self._end = len(self._tokens)
        text = self._release(now[len(before) :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decoded(self, end: int) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._tokens[self._begin : end])

    def _release(self, segment: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else segment
        text = self._held + segment
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
