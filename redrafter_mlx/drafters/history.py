"""Earlier texts, kept between runs where the user asks for it: the tokens of prompts and answers, up to a bound.

One file a target in a folder of the user's choice, an array of int32 token ids, a negative number between two texts.
Nothing else is stored, and nothing unless a folder is named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from redrafter_mlx.output import new_file

from .suffixes import END, LONGEST, SuffixIndex

MOST_TOKENS = 200_000
"""Tokens kept; the oldest texts go first. That many take about half a second to read in."""


class History:
    """The texts of earlier runs with one target.

    Args:
        folder: made with the first text.
        name: of the target; texts of other targets are kept apart.
        vocab_size: V; ids of another tokenizer are refused.
        most_tokens: what is kept.

    Raises:
        ValueError: the file is damaged, or of a target with another vocabulary.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, most_tokens: int = MOST_TOKENS) -> None:
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{vocab_size}.npy"
        self._vocab_size, self._most = vocab_size, most_tokens
        self._texts = self._read()
        self.index = SuffixIndex()
        for text in self._texts:
            self.index.extend(text)
            self.index.begin_text()

    def _read(self) -> list[list[int]]:
        if not self.path.is_file():
            return []
        try:
            tokens = np.load(self.path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a history of texts ({error}): delete it to begin anew"
            ) from None
        is_right = tokens.ndim == 1 and tokens.dtype == np.int32 and tokens.size and tokens[-1] == END
        if not is_right or tokens.min() < END or tokens.max() >= self._vocab_size:
            raise ValueError(
                f"{self.path} is not a history of texts with {self._vocab_size} token ids: delete it to begin anew"
            )
        return [part[:-1].tolist() for part in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]]

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of every text, the oldest first."""
        return [list(text) for text in self._texts]

    def add(self, text: Sequence[int]) -> None:
        """Keep a text: the tokens of a prompt and its answer. One that goes on an earlier one takes its place.

        Raises:
            OSError: it cannot be written.
        """
        tokens = list(text)[-self._most :]
        if not tokens:
            return
        new = tokens
        if self._texts and tokens[: len(self._texts[-1])] == self._texts[-1]:
            new = tokens[max(0, len(self._texts.pop()) - LONGEST) :]
        self._texts.append(tokens)
        while sum(len(each) + 1 for each in self._texts) > self._most + 1 and len(self._texts) > 1:
            del self._texts[0]
        self.index.extend(new)
        self.index.begin_text()
        flat = [token for each in self._texts for token in [*each, END]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as part, part.open("wb") as file:
            np.save(file, np.array(flat, dtype=np.int32))
