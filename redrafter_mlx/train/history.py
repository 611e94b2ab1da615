"""Training on one's own use: the answers in a history that `generate --history FOLDER` has kept.

A history holds the tokens of whole conversations. The answers in it are found by the chat template: they follow what
closes a user's turn, up to a token that ends a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from redrafter_mlx.drafters.history import History
from redrafter_mlx.target import Target

from .prompts import ChatFormat
from .shards import SavedAnswers


def read_history(folder: Path, target: Target, tokenizer: Any) -> SavedAnswers:
    """The answers of a history, each with the tokens before it; their temperatures are not known.

    Raises:
        FileNotFoundError, ValueError: no history of this target, a damaged one, or one without an answer.
    """
    history = History(folder, target.name, target.vocab_size)
    if not history.path.is_file():
        raise FileNotFoundError(
            f"--from-history: {folder} holds no texts of {target.name} (no file {history.path.name}): "
            "`redrafter generate --history FOLDER` keeps them"
        )
    chat = ChatFormat.of(tokenizer)
    found = SavedAnswers([], [], [], [])
    for text in history.texts:
        for begin, end in answer_spans(text, chat):
            asked, answer = text[:begin], text[begin:end]
            found.prompts.append(tokenizer.decode(_user_turn(asked, chat)).strip())
            found.temperatures.append(math.nan)
            found.tokens.append(answer)
            assert found.asked is not None
            found.asked.append(asked)
    if not found.tokens:
        raise ValueError(
            f"--from-history: {history.path} holds no answer in the chat format of {target.name}"
        )
    return found


def answer_spans(tokens: Sequence[int], chat: ChatFormat) -> Iterator[tuple[int, int]]:
    """First token and end of every answer in a conversation; the token that stops an answer belongs to it."""
    size = len(chat.after_user)
    begin = 0
    while begin + size < len(tokens):
        begin += 1
        if tuple(tokens[begin - 1 : begin - 1 + size]) != chat.after_user:
            continue
        first = begin - 1 + size
        stops = (i + 1 for i in range(first, len(tokens)) if tokens[i] in chat.stop)
        end = next(stops, len(tokens))
        if end > first:
            yield first, end
        begin = end


def _user_turn(asked: Sequence[int], chat: ChatFormat) -> list[int]:
    """What the user said last, of the tokens before an answer."""
    closing = len(chat.after_user)
    before = list(asked[: len(asked) - closing])
    opening = list(chat.before_user)
    while any(token in chat.stop for token in opening):  # the system's turn, which only a first turn has
        opening = opening[1:]
    for end in range(len(before), len(opening) - 1, -1):
        if opening and before[end - len(opening) : end] == opening:
            return before[end:]
    return before
