"""Files of prompts: every form, and the line that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.prompts import Request, encode_prompt, read_requests, user


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_four_forms_and_their_ids(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        '"plain text"',
        "",
        '{"prompt": "asked", "id": "a"}',
        '{"question_id": 81, "turns": ["first", "second"]}',
        '{"messages": [{"role": "user", "content": "hällo"}]}',
    )
    assert read_requests(path) == [
        Request(0, "plain text"),
        Request("a", "asked"),
        Request(81, "first"),
        Request(3, [user("hällo")]),
    ]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "Expecting"),
        ("3", "a string or an object"),
        ('""', "not empty"),
        ('{"prompt": 3}', '"prompt" must be text'),
        ('{"question": "x"}', "'question'"),
        ('{"turns": []}', '"turns"'),
        ('{"messages": []}', '"messages"'),
        ('{"messages": [{"role": "user"}]}', '"content"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, rule: str) -> None:
    path = _file(tmp_path, '"good"', line, '"good"')
    with pytest.raises(ValueError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"{path}:2: ") and rule in str(error.value)


def test_no_prompts_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        read_requests(_file(tmp_path, "", " "))
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read_requests(tmp_path / "none.jsonl")


def test_the_system_message_goes_first_unless_there_is_one() -> None:
    system = {"role": "system", "content": "own"}
    assert Request(0, "hi").messages("be brief") == [
        {"role": "system", "content": "be brief"},
        user("hi"),
    ]
    assert Request(0, [system, user("hi")]).messages("be brief") == [system, user("hi")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "x", "max_tokens": 3}', "'max_tokens'"),
        ('{"prompt": "x", "temperature": 1, "stop": []}', "'stop', 'temperature'"),
        ('{"prompt": "x", "messages": []}', "messages and prompt"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' stands twice"),
        ('{"prompt": "\\ud83d"}', "character 0 is the lone surrogate U\\+D83D"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', '"content" must be UTF-8'),
        ('["x"]', "one JSON value a line"),
        ("[", "not an array"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_nothing_in_a_line_is_ignored(tmp_path: Path, line: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        read_requests(_file(tmp_path, line))


def test_a_folder_is_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_requests(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\r\n"two"\r\n')
    assert [request.prompt for request in read_requests(path)] == ["one", "two"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"one"\n"caf\xe9"\n')
    with pytest.raises(ValueError, match=":2: not UTF-8"):
        read_requests(path)


class Words:
    """A tokenizer of words with a beginning-of-text token 0 and a chat template that wants users first."""

    has_chat_template, bos_token = True, "<s>"
    vocabulary = ("<s>", "<user>", "hi", "you")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = [self.vocabulary.index(word) for word in text.split()]
        return [0, *found] if add_special_tokens else found

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        import jinja2

        if messages[0]["role"] != "user":
            raise jinja2.TemplateError("Conversations must begin with a user")
        return "<s> " + " ".join(f"<{m['role']}> {m['content']}" for m in messages)


def ids(prompt: object, raw: bool = False) -> list[int]:
    return encode_prompt(Words(), prompt, raw, 4, "words")


def test_a_prompt_in_every_form() -> None:
    assert ids("hi") == [0, 1, 2]
    assert ids("hi you", raw=True) == [0, 2, 3]
    assert ids("<s> hi", raw=True) == [0, 2], "no second beginning"
    assert ids([{"role": "user", "content": [{"type": "text", "text": "hi "}, {"text": "you"}]}]) == [
        0,
        1,
        2,
        3,
    ]
    assert (
        ids([2, 3]) == ids(np.array([2, 3])) == ids(list(np.array([2, 3]))) == ids(mx.array([2, 3])) == [2, 3]
    )


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        (None, "must be a string, messages, or token ids, not None"),
        (b"hi", "must be a string, messages, or token ids"),
        (7, "must be a string, messages, or token ids, not 7"),
        ([], "empty"),
        ([1.5], "token ids must be integers"),
        ([True], "token ids must be integers"),
        ([4], "must lie in 0..3, not 4"),
        ([-1], "must lie in 0..3, not -1"),
        (["hi"], "needs 'role' and 'content'"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text"),
        (
            [{"role": "system", "content": "hi"}],
            "refuses this conversation: Conversations must begin with a user",
        ),
        ("hi \ud800", "character"),
    ],
)
def test_a_prompt_that_is_none(prompt: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ids(prompt)
