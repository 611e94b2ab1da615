"""Files of prompts: every form, and the line that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from redrafter_mlx.prompts import Request, read_requests, user


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
