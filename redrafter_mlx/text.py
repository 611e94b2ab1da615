"""From tokens to text as it streams: whole UTF-8 characters, ended by a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper


class TextStream:
    """Turns tokens into text piece by piece.

    Bytes of an unfinished character wait for the rest, and so does text that may be the beginning of a stop
    string.
    """

    def __init__(self, tokenizer: TokenizerWrapper | None, stop: Sequence[str] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer if tokenizer is not None else None
        if self._detokenizer is not None:
            self._detokenizer.reset()
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with `token`; sets `stopped` when a stop string is complete."""
        if self._detokenizer is None:
            return ""
        self._detokenizer.add_token(token)
        return self._release(self._detokenizer.last_segment)

    def finish(self) -> str:
        """What was still held back."""
        if self._detokenizer is None:
            return ""
        self._detokenizer.finalize()
        text = self._release(self._detokenizer.last_segment)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

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
