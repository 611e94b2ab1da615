"""What a batch has written so far, kept on the disk so that an interruption costs a minute at most."""

from __future__ import annotations

import hashlib
import logging
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from redrafter_mlx.files import new_file

from .rows import Answer, Row

_log = logging.getLogger("redrafter_mlx")


class Journal:
    """The file of one batch. Written every `seconds` and when the batch is interrupted.

    It holds `rows` (a digest of the prompts, so that it continues no other batch), `tokens` (n,) int32, `lengths`
    (rows,) int64 and `contexts` (n, C) float16, or (0,) where the batch keeps none.
    """

    def __init__(self, path: Path, seconds: float = 60.0) -> None:
        self.path = path
        self._seconds, self._saved = seconds, time.monotonic()

    def load(self, rows: Sequence[Row]) -> list[Answer] | None:
        """What was written to these rows; None where there is no file, or one of other rows or damaged."""
        if not self.path.is_file():
            return None
        try:
            with np.load(self.path) as data:
                if str(data["rows"]) != _digest(rows):
                    _log.warning("%s belongs to other prompts: that batch is written anew", self.path)
                    return None
                ends = np.cumsum(data["lengths"])[:-1]
                tokens, contexts = np.split(data["tokens"], ends), data["contexts"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("%s is damaged (%s): that batch is written anew", self.path, error or "it is empty")
            return None
        kept = np.split(contexts, ends) if contexts.ndim == 2 else [np.zeros((0, 0))] * len(tokens)
        return [Answer(t.tolist(), list(c)) for t, c in zip(tokens, kept, strict=True)]

    def save(self, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """Write the file. An answer caught between its token and its context is kept up to there."""
        with_contexts = any(answer.contexts for answer in answers)
        counts = [min(len(a.tokens), len(a.contexts)) if with_contexts else len(a.tokens) for a in answers]
        tokens = [a.tokens[:n] for a, n in zip(answers, counts, strict=True)]
        contexts = [c for a, n in zip(answers, counts, strict=True) for c in a.contexts[:n]]
        with new_file(self.path) as part, part.open("wb") as file:
            np.savez(
                file,
                rows=_digest(rows),
                tokens=np.array([t for each in tokens for t in each], dtype=np.int32),
                lengths=np.array(counts, dtype=np.int64),
                contexts=np.stack(contexts).astype(np.float16) if contexts else np.zeros(0, dtype=np.float16),
            )
        self._saved = time.monotonic()

    def save_if_due(self, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """`save`, if the last time is long enough ago."""
        if time.monotonic() - self._saved >= self._seconds:
            self.save(rows, answers)


def _digest(rows: Sequence[Row]) -> str:
    values = [(row.prompt, row.max_tokens, row.temperature, row.top_k) for row in rows]
    return hashlib.sha256(repr(values).encode()).hexdigest()
