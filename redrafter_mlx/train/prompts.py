"""Where prompts come from: files, a data set folder, or the target itself.

A prompt is a list of chat messages whose last one is the user's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.prompts import encode_text, render, user
from redrafter_mlx.target import Target

from .generate import Control, Row, generate_batch

Messages = list[dict[str, str]]

# Beginnings of a user's turn, so that all kinds of tasks that people ask for occur.
OPENERS = (
    "Write a", "Write an essay about", "Write a story about", "Write a poem about",
    "Write an email to", "Write a letter", "Write a blog post about", "Write a speech",
    "Write a review of", "Write a recipe for", "Draft a", "Create a plan for", "Explain",
    "Explain how", "Explain why", "Explain to a child", "Describe", "Describe the process of",
    "What is", "What are the main causes of", "What are the differences between", "How does",
    "How do I", "Why do", "Discuss", "Compare and contrast", "Give me five", "List the", "Suggest",
    "Summarize the following text:", "Summarize", "Extract the names from the following text:",
    "Classify the following", "Answer in JSON:", "Read the passage below",
    "Rewrite the following sentence", "Translate", "Act as a", "You are a doctor.",
    "You are a teacher.", "Pretend you are", "Let's play a game.", "Tell me about the history of",
    "Tell me about the role of", "Who was", "Solve", "Solve the equation", "Calculate",
    "If a train", "A shop sells", "Find the", "Prove that", "A farmer has", "How many",
    "What is the probability", "Write a Python function", "Write a function that",
    "Write a JavaScript", "Write a C program", "Write an SQL query", "Implement",
    "Debug the following code:", "Design an algorithm", "In a village", "I have a problem:",
    "Can you help me", "Should I", "Imagine", "Think of", "Is it true that", "In economics,",
    "In physics,", "In biology,", "In philosophy,",
)  # fmt: skip
MIN_WORDS, MAX_PROMPT_TOKENS = 3, 80


def normalize(text: str) -> str:
    """Reduce a prompt to its words, without case, punctuation and spacing. Prompts are compared in this form."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_held_out(text: str, every: int) -> bool:
    """True for one prompt in `every`. Its hash decides, so a prompt is held out in every run or in none."""
    digest = hashlib.sha256(normalize(text).encode()).digest()
    return int.from_bytes(digest[:4], "big") % every == 0


def user_text(messages: Messages) -> str:
    """Everything that the user says in a prompt; two prompts with the same user text count as the same."""
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


class PromptFilter:
    """Accepts every prompt once, and never an excluded one."""

    def __init__(self, excluded: Iterable[str] = ()) -> None:
        self._excluded = {normalize(text) for text in excluded} - {""}
        self._seen: set[str] = set()

    def accepts(self, text: str) -> bool:
        """True for a prompt that was not accepted before; remembers it."""
        key = normalize(text)
        if key in self._seen or self.excludes(text):
            return False
        self._seen.add(key)
        return True

    def excludes(self, text: str) -> bool:
        """True for an empty prompt and for one that must not be trained on."""
        key = normalize(text)
        return not key or any(self._resembles(key, other) for other in self._excluded)

    @staticmethod
    def _resembles(key: str, excluded: str) -> bool:
        """True if they are equal or one begins with the other, so that cut and extended copies are found too."""
        return key.startswith(excluded) or (len(key) >= 40 and excluded.startswith(key))


def read_prompts(path: Path) -> list[Messages]:
    """Read the prompts of a `.jsonl` file, a text file (one per line) or a folder of .jsonl, .json and .txt files.

    A JSON line holds "messages", "conversations" (from / value), "turns" (texts) or a string under "prompt",
    "instruction", "question" or "text"; a conversation is cut before its last assistant turn.
    Parquet and Arrow files are not read.

    Raises:
        FileNotFoundError, ValueError: no such file, a file without prompts, or a line that is not a prompt.
    """
    if path.is_dir():
        files = sorted(f for kind in ("jsonl", "json", "txt") for f in path.rglob(f"*.{kind}"))
        files = [f for f in files if f.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
        if not files:
            other = sorted({f.suffix for f in path.rglob("*") if f.is_file()})
            raise ValueError(
                f"prompts: {path} holds no .jsonl, .json or .txt file "
                f"(found: {', '.join(other) or 'nothing'}); "
                "export a parquet data set with `dataset.to_json('prompts.jsonl')`"
            )
        return [prompt for file in files for prompt in _read_file(file)]
    prompts = list(_read_file(path))
    if not prompts:
        raise ValueError(f"prompts: {path} must hold at least one prompt, but it is empty")
    return prompts


def read_excluded(path: Path) -> list[str]:
    """Read what users say in a file or folder of prompts, such as a benchmark, that must not be trained on.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`.
    """
    return [m["content"] for prompt in read_prompts(path) for m in prompt if m["role"] == "user"]


def _read_file(path: Path) -> Iterator[Messages]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} must be UTF-8 text: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        yield from ([{"role": "user", "content": line.strip()}] for line in text.splitlines() if line.strip())
        return
    if path.suffix == ".json" and text.lstrip().startswith("["):
        lines = [json.dumps(value) for value in json.loads(text)]
    else:
        lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _messages(line, f"prompts: {path} line {number}")


def _messages(line: str, where: str) -> Messages:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object or string, not {type(value).__name__}")
    try:
        messages = _conversation(value)
    except AttributeError:
        raise ValueError(f"{where}: every message must be an object with role and content") from None
    if messages is None:
        raise ValueError(f"{where} needs 'prompt' or 'messages', but has {sorted(value)}")
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: no message has the role 'user'")
    return messages


def _conversation(value: dict[str, Any]) -> Messages | None:
    """The messages of one JSON object; None if it has none."""
    if isinstance(value.get("turns"), list):  # MT-bench: what the user says, turn by turn
        return [{"role": "user", "content": str(text)} for text in value["turns"]]
    turns = value.get("messages") or value.get("conversations")
    if turns is not None:
        roles = {"human": "user", "gpt": "assistant"}
        return [
            {"role": roles.get(role, role), "content": str(turn.get("content", turn.get("value", "")))}
            for turn in turns
            for role in [str(turn.get("role", turn.get("from", "")))]
        ]
    for key in ("prompt", "instruction", "question", "text"):
        if isinstance(value.get(key), str) and value[key].strip():
            return [{"role": "user", "content": value[key].strip()}]
    return None


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The token ids around a user's turn in the target's chat template."""

    before_user: tuple[int, ...]
    after_user: tuple[int, ...]
    stop: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Read the format off the tokenizer's chat template.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the target has no chat template, so it cannot ask itself: give --prompts")
        mark = "\u2603mark\u2603"
        before, _, after = render(tokenizer, [user(mark)]).partition(mark)
        encode = [tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after)]
        return cls(encode[0], encode[1], frozenset(tokenizer.eos_token_ids))


def self_prompts(
    target: Target, tokenizer: Any, count: int, rng: np.random.Generator, control: Control | None = None
) -> list[str]:
    """Have an instruct model write up to `count` user turns (T = 0.9, top-40).

    Half of them start from nothing, half from one of `OPENERS`. Unfinished and trivial ones are left out. With a
    journal, the same call later returns the same turns without the model.
    """
    chat = ChatFormat.of(tokenizer)
    openers = ["" if rng.random() < 0.5 else OPENERS[rng.integers(len(OPENERS))] for _ in range(count)]
    rows = [
        Row(
            (*chat.before_user, *tokenizer.encode(opener, add_special_tokens=False)),
            MAX_PROMPT_TOKENS, 0.9, 40,
        )
        for opener in openers
    ]  # fmt: skip
    stop = chat.stop | set(chat.after_user[:1])
    turns, texts = generate_batch(target, rows, stop, rng, with_contexts=False, control=control), []
    if control is not None and control.journal is not None:
        control.journal.save(rows, turns)
    for opener, turn in zip(openers, turns, strict=True):
        text = (opener + tokenizer.decode(turn.tokens[:-1])).strip()
        if turn.stopped and len(text.split()) >= MIN_WORDS:
            texts.append(text)
    return texts


def check_prompts(tokenizer: Any, prompts: Sequence[Messages]) -> None:
    """Check that the chat template takes every prompt, before hours of writing end at one.

    Raises:
        ValueError: one that it refuses, with its number and the template's words.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    for number, messages in enumerate(prompts, 1):
        try:
            render(tokenizer, list(messages))
        except ValueError as error:
            raise ValueError(f"prompts: number {number}: {error}") from None


def tokenize(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a prompt up to where the assistant answers; of its plain text if there is no chat template."""
    if getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, render(tokenizer, list(messages)), special=False)
    return list(tokenizer.encode("\n".join(m["content"] for m in messages)))
