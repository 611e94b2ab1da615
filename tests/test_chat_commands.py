"""What can be typed in a conversation besides messages, and conversations as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apps import saved
from apps.chat_commands import COMMANDS, Chat, run_command
from apps.conversation import Conversation
from apps.defaults import PLAIN, chat_sampling
from redrafter_mlx import Sampling, load
from redrafter_mlx.generation import Model, Options
from tests import toy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toy.save_folder(tmp_path_factory.mktemp("tiny") / "m"))


@pytest.fixture
def chat(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    settings = Options(6, Sampling(temperature=1.0, seed=4), "2x3")
    return Chat(Conversation(model, settings), "tiny", shows_drafts=True)


def say(chat: Chat, text: str) -> str:
    return "".join(chunk.text for chunk in chat.conversation.say(chat.with_files(text)))


def test_settings_change_what_comes_next(chat: Chat) -> None:
    for line in ("/temperature 0", "/seed 7", "/draft off"):
        assert run_command(chat, line)
    settings = chat.conversation.settings
    assert settings.sampling == Sampling(temperature=0, seed=7) and settings.draft == "off"
    say(chat, "hi")
    assert chat.conversation.last is not None and chat.conversation.last.drafted_tokens == 0
    run_command(chat, "/seed none")
    assert chat.conversation.settings.sampling.seed is None
    run_command(chat, "/draft hide")
    assert not chat.shows_drafts and chat.conversation.settings.draft == "off"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temperature warm", "temperature must be a number, not 'warm'"),
        ("/temperature -1", "temperature must be a number, 0 or more"),
        ("/seed 1.5", "seed must be a number"),
        ("/draft 9", "'9'"),
        ("/draft 300x2@8", "beam width must be at most"),
        ("/model /no/where", "/no/where"),
        ("/load nothing", "nothing.json"),
        ("/load", "no conversation was saved"),
        ("/file", "needs a path"),
        ("/file /no/where", "/no/where"),
        ("/retry", "nothing was said yet"),
        ("/edit", "nothing was said yet"),
        ("/copy", "nothing was said yet"),
        ("/retry now", "takes nothing behind it, not 'now'"),
        ("/nonsense", "no command /nonsense"),
    ],
)
def test_mistakes_change_nothing(chat: Chat, line: str, words: str) -> None:
    before = chat.conversation.settings
    with pytest.raises((ValueError, OSError)) as error:
        run_command(chat, line)
    assert words in str(error.value)
    assert chat.conversation.settings == before and not chat.conversation.messages


def test_retry_and_edit_take_the_last_exchange_back(chat: Chat) -> None:
    say(chat, "one")
    answer = say(chat, "two")
    run_command(chat, "/retry")
    assert chat.next_message == "two" and len(chat.conversation.messages) == 2
    assert say(chat, "two") == answer, "the seed is the same"
    run_command(chat, "/edit three")
    assert chat.next_message == "three" and len(chat.conversation.messages) == 2
    say(chat, "three")
    run_command(chat, "/edit")
    assert chat.next_edit == "three" and len(chat.conversation.messages) == 2


def test_a_file_goes_with_the_next_message_alone(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    run_command(chat, f"/file {tmp_path / 'f.py'}")
    assert chat.with_files("explain") == "f.py:\n```\nx = 1\n```\n\nexplain"
    assert chat.with_files("next") == "next"
    (tmp_path / "f.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        run_command(chat, f"/file {tmp_path / 'f.bin'}")


def test_saved_and_loaded_it_goes_on_as_it_was(chat: Chat, model: Model) -> None:
    run_command(chat, "/system be kind")
    say(chat, "one")
    run_command(chat, "/save mine")
    assert saved.last() == saved.named("mine") and saved.named("mine").stat().st_mode & 0o77 == 0
    other = Chat(Conversation(model, chat.conversation.settings), "tiny")
    run_command(other, "/load mine")
    assert other.conversation.system == "be kind"
    assert other.conversation.messages == chat.conversation.messages
    say(other, "two")
    assert other.conversation.last is not None and other.conversation.last.prompt_tokens > 20


def test_every_answer_is_kept_where_the_chat_has_a_file(chat: Chat, tmp_path: Path) -> None:
    chat.path = tmp_path / "talks" / "talk.json"
    chat.save()
    assert not chat.path.exists(), "nothing was said"
    say(chat, "one")
    chat.save()
    assert len(saved.load(chat.path).messages) == 2


GOOD = {"format": "redrafter-chat", "version": 1, "model": "m", "system": None,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "x"}, "must be a conversation"),
        ({"version": 2}, "version 2"),
        ({"system": 3}, "system text or null"),
        ({"messages": 3}, "messages a list"),
        ({"messages": GOOD["messages"][:1]}, "the last message"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "message 0"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
    ],
)
def test_a_file_that_is_no_conversation(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(GOOD))
    assert saved.load(path).messages == GOOD["messages"]
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(ValueError, match=words):
        saved.load(path)


def test_help_names_every_command(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(chat, "/help")
    shown = capsys.readouterr().err
    assert all(name in shown for name in COMMANDS)
    assert not run_command(chat, "/bye")


def test_another_model_goes_on_with_the_conversation(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(chat, "one")
    messages = list(chat.conversation.messages)
    run_command(chat, f"/model {toy.save_folder(tmp_path / 'other', seed=5)}")
    assert chat.conversation.messages == messages
    assert say(chat, "two") is not None and len(chat.conversation.messages) == 4
    assert "a drafter" in capsys.readouterr().err


def test_copy_takes_what_there_is(chat: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    say(chat, "one")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="no clipboard"):
        run_command(chat, "/copy")
    taken: list[bytes] = []
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", lambda command, input, **_: taken.append(input))
    run_command(chat, "/copy")
    assert taken == [chat.conversation.messages[-1]["content"].encode()]


@pytest.mark.parametrize(
    ("config", "given", "wanted"),
    [
        (None, {}, PLAIN),
        ({}, {"temperature": 0.5}, {**PLAIN, "temperature": 0.5}),
        ({"temperature": 0.6, "top_k": 20, "eos_token_id": 3}, {}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "top_p": 0.8}, {}, {"temperature": 1.0, "top_p": 0.8}),
        ({"do_sample": False, "temperature": 1.0}, {}, {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.3, "seed": None}, {"temperature": 0.3}),
        ({"repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
    ],
)
def test_the_models_own_sampling_is_the_default(
    config: dict[str, Any] | None, given: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert chat_sampling(str(tmp_path), given) == wanted
    Sampling(**wanted)


def test_sampling_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ValueError, match="temperature must be a number, not 'warm'"):
        chat_sampling(str(tmp_path), {})
