"""Prompts: files of them, one JSON value per line, and what a tokenizer makes of one."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

BYTE_ORDER_MARK = "\ufeff".encode()
LINE_KEYS = frozenset({
    "messages", "prompt", "turns", "id", "question_id", "category", "reference", "answer", "source", "dataset",
    "name", "tags", "metadata",
})  # fmt: skip
"""What a line of a file of prompts may hold; all but the first three describe it."""

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a file."""

    id: object
    """the line's `id` or `question_id`; its index among the prompts where it has neither"""
    prompt: str | list[dict[str, str]]
    """a user's text, or messages"""
    category: str = "all"
    """the line's `category`, for figures by kind of task"""

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """As a conversation; `system` goes first where there is no system message yet."""
        said = [user(self.prompt)] if isinstance(self.prompt, str) else list(self.prompt)
        if system is not None and said[0]["role"] != "system":
            said.insert(0, {"role": "system", "content": system})
        return said


def decode_text(data: bytes, name: str) -> str:
    """What a user wrote, from its bytes: UTF-8 without a leading byte order mark, with plain line ends.

    Args:
        name: what to call it in the message.

    Raises:
        ValueError: it is not UTF-8.
    """
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        wrong = f"its byte {error.start} is 0x{data[error.start]:02x}"
        raise ValueError(f"{name} must be UTF-8, and {wrong} ({error.reason})") from None


def check_text(text: str, name: str) -> str:
    """Return `text` if UTF-8 can hold it: an argument's bytes that are not UTF-8, and halves of a surrogate pair in
    JSON, arrive as characters that it cannot.

    Raises:
        ValueError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}"
            if 0xDC80 <= code <= 0xDCFF
            else f"the lone surrogate U+{code:X}"
        )
        raise ValueError(f"{name} must be UTF-8, and its character {error.start} is {what}") from None
    return text


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def read_requests(path: Path) -> list[Request]:
    """Prompts of a JSONL file. A line is a string, or an object with "prompt" (text), "messages" or
    "turns" (MT-bench: the first is taken). Blank lines are skipped.

    Raises:
        FileNotFoundError, ValueError: no such file; the first line that is not one; no prompt.
    """
    if not path.exists():
        raise FileNotFoundError(f"--prompts: no file {path}")
    if path.is_dir():
        raise ValueError(f"--prompts: {path} is a folder, and a file is needed")
    requests: list[Request] = []
    for number, line in enumerate(path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(_json(line), len(requests)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not requests:
        raise ValueError(f"{path} holds no prompts: it needs at least one line")
    return requests


def _json(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    hint = (
        " (one JSON value a line is expected, not an array over several)" if text.lstrip()[:1] == "[" else ""
    )
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}{hint}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose keys none stands twice: one of the two would be dropped."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values


def _request(value: Any, index: int) -> Request:
    if isinstance(value, str):
        return Request(index, _text(value, "the prompt"))
    if not isinstance(value, dict):
        hint = ": one JSON value a line is expected" if isinstance(value, list) else ""
        raise ValueError(f"a line must be a string or an object, not {json.dumps(value)[:60]}{hint}")
    wanted = [key for key in ("messages", "prompt", "turns") if key in value]
    if len(wanted) > 1:
        raise ValueError(f'one of "messages", "prompt" and "turns" is needed, found {" and ".join(wanted)}')
    others = sorted(set(value) - LINE_KEYS)
    if others:
        raise ValueError(
            f"{', '.join(map(repr, others))} in a line is not known: settings are options of the command and hold for "
            "all lines"
        )
    name = value.get("id", value.get("question_id", index))
    category = str(value.get("category", "all"))
    if "messages" in value:
        return Request(name, _messages(value["messages"]), category)
    if "prompt" in value:
        return Request(name, _text(value["prompt"], '"prompt"'), category)
    if "turns" in value:
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError('"turns" must be a list of strings that is not empty')
        return Request(name, _text(turns[0], '"turns"[0]'), category)
    raise ValueError(f'"prompt", "messages" or "turns" is needed, found {sorted(value) or "nothing"}')


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text that is not empty, not {json.dumps(value)[:60]}")
    return check_text(value, name)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError('"messages" must be a list that is not empty')
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f'a message needs "role" and "content", both text, not {json.dumps(message)[:60]}'
            )
        for key in ("role", "content"):
            check_text(message[key], f'"{key}"')
    return value


def encode_prompt(
    tokenizer: TokenizerWrapper | None, prompt: Prompt, raw: bool, vocab_size: int, name: str
) -> list[int]:
    """Token ids of a prompt: a string (as a user's message unless `raw`), messages, or token ids.

    Args:
        name: what to call the model in messages.

    Raises:
        ValueError: empty, ids outside the vocabulary, text without a tokenizer or chat template, text that is not
            Unicode, or messages that the chat template refuses.
    """
    tokens = _token_ids(prompt)
    if tokens is None:
        tokens = _encode_text(tokenizer, prompt, raw, name)
    if not tokens:
        raise ValueError("the prompt is empty: it needs at least one token")
    worst = max(tokens, key=lambda t: t if t >= 0 else float("inf"))
    if not 0 <= worst < vocab_size:
        raise ValueError(f"token ids must lie in 0..{vocab_size - 1}, not {worst}")
    return tokens


def _token_ids(prompt: Any) -> list[int] | None:
    """The prompt as a list of ids, where it is one: of Python, NumPy or MLX; None where it is text."""
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, (bytes, bytearray)) or prompt is None or not hasattr(prompt, "__len__"):
        raise ValueError(f"a prompt must be a string, messages, or token ids, not {_short(prompt)}")
    items = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not isinstance(items, list) or any(isinstance(item, (Mapping, str)) for item in items):
        return None
    try:
        ids = [operator.index(item) for item in items]
    except TypeError:
        ids = []
    if len(ids) < len(items) or any(isinstance(item, bool) for item in items):
        raise ValueError(f"token ids must be integers, not {_short(items)}")
    return ids


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _encode_text(tokenizer: TokenizerWrapper | None, prompt: Any, raw: bool, name: str) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer: give the prompt as token ids")
    if isinstance(prompt, str) and (raw or not tokenizer.has_chat_template):
        return encode_text(tokenizer, prompt)
    messages = [user(prompt)] if isinstance(prompt, str) else [_plain_message(each) for each in prompt]
    if not tokenizer.has_chat_template:
        raise ValueError(f"{name} has no chat template: give the prompt as a string")
    return encode_text(tokenizer, render(tokenizer, messages), special=False)


def render(tokenizer: TokenizerWrapper, messages: list[dict[str, str]]) -> str:
    """Messages as the chat template writes them, up to where the answer begins.

    Raises:
        ValueError: the template refuses them; with its words.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from None
    return cast(str, text)


def encode_text(tokenizer: TokenizerWrapper, text: str, special: bool = True) -> list[int]:
    """Token ids of a text. With `special` a beginning-of-text token comes first where the tokenizer adds one, but not
    a second one where the text begins with it.

    Raises:
        ValueError: the text is not Unicode (a lone surrogate).
    """
    check_text(text, "the prompt")
    begin = getattr(tokenizer, "bos_token", None)
    if special and begin and text.startswith(begin):
        special = False
    return list(tokenizer.encode(text, add_special_tokens=special))


def _plain_message(message: Any) -> dict[str, str]:
    """A message whose content is one text; text parts are joined, as OpenAI's clients send them."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message needs 'role' and 'content', not {_short(message)}")
    content = message["content"]
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(cast(list[str], parts))
    if not isinstance(message["role"], str) or not isinstance(content, str):
        raise ValueError(f"a message's role and content must be text, not {_short(message)}")
    return {**message, "content": content}
