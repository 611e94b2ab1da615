"""Shards: files of text that the target wrote, with the contexts in which it chose the tokens.

A shard is two files. `shard-00000.contexts.npy` (n, C) float16: the target's context (final-norm hidden state, then any
`context_layers`) when it chose a token. `shard-00000.npz`: `tokens` (n,) int32, the token chosen in each context;
`starts` (rows + 1,) int64, where each answer begins; `temperatures` (rows,); `prompts` (rows,) text. The .npz is saved
last, so a shard without it does not exist. Both reach the disk before they get their names, so that a power cut leaves
whole files or none.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from redrafter_mlx.files import new_file

from .generate import Answer

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What NumPy raises on a file that is cut short, empty or of another kind."""


def shard_path(folder: Path, index: int) -> Path:
    """Where a folder keeps the tokens of one shard."""
    return folder / f"shard-{index:05d}.npz"


def contexts_path(shard: Path) -> Path:
    """The file of contexts that belongs to a shard's file of tokens."""
    return shard.with_suffix(".contexts.npy")


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder of which both files are there, in order."""
    return sorted(p for p in folder.glob("shard-*.npz") if contexts_path(p).is_file())


@contextmanager
def durable_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that appears as `path` once its bytes are on the disk."""
    with new_file(path) as part, part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse; the files themselves are synced
    finally:
        os.close(descriptor)


def save_shard(
    shard: Path, prompts: Sequence[str], temperatures: Sequence[float], answers: Sequence[Answer]
) -> int:
    """Save one shard; returns its number of tokens."""
    starts = np.cumsum([0, *(len(a.tokens) for a in answers)], dtype=np.int64)
    contexts = np.stack([c for a in answers for c in a.contexts]).astype(np.float16)
    with durable_file(contexts_path(shard)) as file:
        np.save(file, contexts)
    with durable_file(shard) as file:
        np.savez(
            file,
            tokens=np.concatenate([a.tokens for a in answers]).astype(np.int32),
            starts=starts,
            temperatures=np.array(temperatures, dtype=np.float32),
            prompts=np.array(list(prompts), dtype=np.str_),
        )
    return int(starts[-1])


@dataclass(frozen=True, slots=True)
class ShardText:
    """What a shard holds besides its contexts."""

    tokens: np.ndarray
    """(n,) int32"""
    starts: np.ndarray
    """(rows + 1,) int64"""
    temperatures: np.ndarray
    """(rows,) float32"""
    prompts: list[str]

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each answer."""
        return [answer.tolist() for answer in np.split(self.tokens, self.starts[1:-1])]


def read_shard(path: Path) -> tuple[ShardText, np.ndarray]:
    """The text of a shard, and its contexts (n, C) float16, mapped into memory.

    Raises:
        ValueError: one of its two files is damaged, or they do not belong together; it is named, with what to do.
    """
    try:
        with np.load(path) as data:
            text = ShardText(
                data["tokens"], data["starts"], data["temperatures"], [str(t) for t in data["prompts"]]
            )
    except _DAMAGED as error:
        raise _damaged(path, str(error)) from None
    beside = contexts_path(path)
    try:
        contexts = np.load(beside, mmap_mode="r")
    except _DAMAGED as error:
        raise _damaged(beside, str(error)) from None
    if contexts.ndim != 2 or contexts.dtype != np.float16 or len(contexts) != len(text.tokens):
        raise _damaged(
            beside,
            f"it must be float16 of shape ({len(text.tokens)}, C), not {contexts.dtype} of {contexts.shape}",
        )
    rows, starts = len(text.prompts), text.starts
    if (
        starts.shape != (rows + 1,)
        or len(text.temperatures) != rows
        or (starts[0], starts[-1]) != (0, len(text.tokens))
        or (np.diff(starts) < 0).any()
    ):
        raise _damaged(path, "its answers, prompts and temperatures differ in number")
    return text, contexts


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged ({why or 'it is empty'}): delete it, and its shard is written anew")


@dataclass(frozen=True, slots=True)
class SavedAnswers:
    """Answers without their contexts: small enough to keep, and the contexts can be computed again.

    Its file holds `tokens` (n,), `lengths` and `temperatures` (rows,), and `prompts` in UTF-8, separated by zero bytes.
    """

    prompts: list[str]
    """One turn of a user each."""
    temperatures: list[float]
    """NaN where it is not known."""
    tokens: list[list[int]]
    asked: list[list[int]] | None = None
    """The tokens before each answer, where they are more than its prompt in the chat template; not in the file."""

    @classmethod
    def load(cls, path: Path) -> SavedAnswers:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or one that is damaged or of another kind.
        """
        if not path.is_file():
            raise FileNotFoundError(f"--text: no file {path}")
        try:
            with np.load(path) as data:
                prompts = bytes(data["prompts"]).decode().split("\0")
                temperatures, lengths = data["temperatures"].astype(np.float32).tolist(), data["lengths"]
                tokens = np.split(data["tokens"].astype(np.int32), np.cumsum(lengths)[:-1])
        except _DAMAGED as error:
            raise ValueError(f"--text: {path} does not hold answers, or is cut short: {error}") from None
        if not len(prompts) == len(temperatures) == len(tokens):
            raise ValueError(
                f"--text: {path} must have as many prompts as temperatures and answers, "
                f"not {len(prompts)}, {len(temperatures)} and {len(tokens)}"
            )
        return cls(prompts, temperatures, [answer.tolist() for answer in tokens])

    @classmethod
    def of(cls, shards: Sequence[Path]) -> SavedAnswers:
        """The answers of some shards.

        Raises:
            ValueError: see `read_shard`.
        """
        found = cls([], [], [])
        for path in shards:
            text, _ = read_shard(path)
            found.prompts.extend(text.prompts)
            found.temperatures.extend(text.temperatures.tolist())
            found.tokens.extend(text.answers)
        return found

    def first(self, count: int | None) -> SavedAnswers:
        """The first `count` answers; all for None."""
        asked = None if self.asked is None else self.asked[:count]
        return SavedAnswers(self.prompts[:count], self.temperatures[:count], self.tokens[:count], asked)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def check_vocabulary(self, vocab_size: int, where: Path) -> None:
        """Check that a target of `vocab_size` tokens can have written this.

        Raises:
            ValueError: a token that it does not have.
        """
        top = max((max(answer) for answer in self.tokens if answer), default=0)
        low = min((min(answer) for answer in self.tokens if answer), default=0)
        if not 0 <= low <= top < vocab_size:
            raise ValueError(
                f"--text: {where} holds the token {low if low < 0 else top}, and the target's are "
                f"0..{vocab_size - 1}: another model wrote it"
            )

    def save(self, path: Path) -> None:
        """Write the file."""
        with durable_file(path) as file:
            np.savez_compressed(
                file,
                tokens=np.concatenate(self.tokens).astype(np.int32),
                lengths=np.array([len(answer) for answer in self.tokens], dtype=np.int32),
                temperatures=np.array(self.temperatures, dtype=np.float16),
                prompts=np.frombuffer("\0".join(self.prompts).encode(), dtype=np.uint8),
            )
