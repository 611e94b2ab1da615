"""Where prompts come from, and which are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redrafter_mlx.train.data import Generator
from redrafter_mlx.train.prompts import (
    ChatFormat,
    PromptFilter,
    check_prompts,
    is_held_out,
    normalize,
    read_excluded,
    read_prompts,
)
from redrafter_mlx.train.recipe import Recipe

from .toy import make_target
from .training import (
    EOS,
    ToyTokenizer,
    asked,
)

# isort: split


def test_prompts_pass_once_and_excluded_ones_never() -> None:
    long = "Compose a travel blog post about a recent trip to an island far away"
    prompts = PromptFilter([long, "Who are you?"])
    assert prompts.accepts("What is  love?")
    assert not prompts.accepts("what is LOVE")
    assert not prompts.accepts(long.lower() + "!")
    assert not prompts.accepts(long + " and say why.")
    assert not prompts.accepts(long[:60])
    assert not prompts.accepts("who are you")
    assert not prompts.accepts("  ?! ")
    assert prompts.accepts("Who is she?")


def test_held_out_share_is_as_asked_and_does_not_depend_on_spelling() -> None:
    texts = [f"question number {i}" for i in range(4000)]
    held = [text for text in texts if is_held_out(text, 20)]
    assert 120 < len(held) < 290  # 200 expected, deviation 14
    assert all(is_held_out(text.upper() + "?", 20) for text in held)
    assert normalize("A,  b! ") == "a b"


def test_the_chat_format_is_read_from_the_template() -> None:
    class Plain(ToyTokenizer):
        def apply_chat_template(
            self, messages: Any, add_generation_prompt: bool = True, tokenize: bool = True
        ) -> str:
            return f"<s>{messages[0]['content']}><"

    chat = ChatFormat.of(Plain())
    assert chat.before_user == (1, 3 + 18, EOS) and chat.after_user == (EOS, 1)
    assert chat.stop == {EOS}


def test_a_target_without_a_chat_template_cannot_ask_itself(tmp_path: Path) -> None:
    tokenizer = ToyTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Generator(make_target(), tokenizer, tmp_path / "data", Recipe("tiny"))
    assert not (tmp_path / "data").exists()


def test_prompts_from_files(tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    turns = [turn("system", "s"), turn("user", "two"), turn("assistant", "x")]
    shared = [{"from": "human", "value": "three"}, {"from": "gpt", "value": "y"}]
    lines = [
        json.dumps({"prompt": "one"}),
        "",
        json.dumps({"messages": turns}),
        json.dumps({"conversations": shared}),
        json.dumps("four"),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("five\n\nsix\n")
    read = read_prompts(tmp_path)
    assert [messages[-1] for messages in read] == [
        {"role": "user", "content": word} for word in ("one", "two", "three", "four", "five", "six")
    ]
    assert read[1][0]["role"] == "system"


def test_every_turn_of_a_benchmark_is_excluded(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(
        json.dumps({"question_id": 81, "turns": ["Write about Hawaii.", "Now shorter."]})
    )
    prompts = PromptFilter(read_excluded(tmp_path / "bench.jsonl"))
    assert not prompts.accepts("write about hawaii") and not prompts.accepts("now SHORTER")
    assert prompts.accepts("Write about Maui.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "at least one prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "JSON object or string, not list"),
        ("keys.jsonl", '{"answer": "a"}', "needs 'prompt' or 'messages', but has \\['answer'\\]"),
        (
            "nobody.jsonl",
            '{"messages": [{"role": "system", "content": "a"}]}',
            "no message has the role",
        ),
        ("odd.jsonl", '{"messages": ["a"]}', "role and content"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_missing_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="found: .parquet"):
        read_prompts(tmp_path)


def test_a_prompt_that_the_template_refuses_is_named_before_any_is_answered() -> None:
    import jinja2

    class Strict(ToyTokenizer):
        def apply_chat_template(
            self, messages: Any, add_generation_prompt: bool = True, tokenize: bool = True
        ) -> str:
            if messages[0]["role"] == "system":
                raise jinja2.TemplateError("System role not supported")
            return "<>"

    fine = asked("aa", "bb")
    check_prompts(Strict(), fine)
    with pytest.raises(ValueError, match="prompts: number 3: .* System role not supported"):
        check_prompts(Strict(), [*fine, [{"role": "system", "content": "x"}, *fine[0]]])
