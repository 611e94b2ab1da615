"""`redrafter chat`: history, cache reuse, Ctrl-C, a full context; without a terminal."""

from __future__ import annotations

import io
import os
import shutil
import signal
from pathlib import Path

import pytest

from apps import chat as chat_module
from apps import console
from apps.chat_commands import Chat, run_command
from apps.cli import main
from apps.conversation import Conversation
from redrafter_mlx import Sampling, load
from redrafter_mlx.auto import CostTable
from redrafter_mlx.generation import Model, Options
from tests import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save_folder(tmp_path_factory.mktemp("tiny"), max_length=160)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


def _conversation(model: Model, draft: str = "2x3", max_tokens: int = 12) -> Conversation:
    return Conversation(model, Options(max_tokens, Sampling(temperature=1.0, seed=4), draft))


def _say(conversation: Conversation, text: str) -> str:
    return "".join(chunk.text for chunk in conversation.say(text))


@pytest.mark.parametrize("draft", ["off", "2x3"])
def test_the_next_turn_reuses_all_that_was_processed(model: Model, draft: str) -> None:
    """The toy's random bytes are mostly not UTF-8: tokenized anew, its text would be other ids."""
    conversation = _conversation(model, draft)
    answer = _say(conversation, "hello")
    first = conversation.last
    assert first is not None and first.reused_tokens == 0
    held = conversation.cache.tokens
    _say(conversation, "more")
    second = conversation.last
    assert second is not None
    assert second.reused_tokens == len(held) >= first.prompt_tokens + first.generated_tokens - 1
    assert conversation.messages[:3] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "more"},
    ]


def test_the_answer_is_that_of_a_conversation_without_a_cache(model: Model) -> None:
    kept, fresh = _conversation(model), _conversation(model, "off")
    for text in ("hello", "more"):
        fresh.cache = type(fresh.cache)()
        assert _say(kept, text) == _say(fresh, text)
    assert fresh.last is not None and fresh.last.reused_tokens == 0
    assert kept.last is not None and kept.last.token_ids == fresh.last.token_ids


def test_a_template_that_rewrites_the_answer_is_followed(model: Model) -> None:
    conversation = _conversation(model)
    _say(conversation, "hello")
    conversation.messages[-1]["content"] = "edited"
    _say(conversation, "more")
    assert model.tokenizer is not None and conversation.last is not None
    ids = model.tokenizer.apply_chat_template(conversation.messages[:3], add_generation_prompt=True)
    assert conversation.last.prompt_tokens == len(list(ids))


def test_what_was_said_before_a_stop_stays(model: Model) -> None:
    conversation = _conversation(model)
    stream = conversation.say("hello")
    said = next(stream).text + next(stream).text + next(stream).text
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    _say(conversation, "more")
    assert conversation.last is not None
    assert conversation.last.reused_tokens >= 1 + 5 + 2 + 2  # the prompt and two of three tokens


def test_a_full_context_forgets_the_oldest_exchanges(model: Model) -> None:
    conversation = _conversation(model, max_tokens=40)
    dropped = 0
    for _ in range(6):
        _say(conversation, "x" * 30)
        dropped += conversation.dropped
        stats = conversation.last
        assert stats is not None and stats.prompt_tokens + stats.generated_tokens <= 160
    assert dropped > 0
    assert conversation.messages[0]["role"] == "user"


def test_a_message_longer_than_the_context_is_refused_and_forgotten(model: Model) -> None:
    conversation = _conversation(model)
    _say(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="context of 160"):
        conversation.say("x" * 500)
    assert conversation.messages == before
    assert _say(conversation, "still here?") is not None


def test_a_model_without_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        _conversation(toy.make())


def test_piped_conversation_and_commands(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "/stats",
        "hi",
        "/stats",
        "two \\",
        "lines",
        "/system be kind",
        "/system",
        "/nonsense",
        "/stats x",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/quit", "unread"])))
    argv = ["chat", "--model", str(folder), "--draft", "2x3", "--max-tokens", "6", "--seed", "1"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2 and "tokens/s" not in out
    assert "nothing was said yet" in err and "prompt_tokens: 5" in err
    assert "be kind" in err and "no command /nonsense" in err
    assert "/stats takes nothing behind it, not 'x'" in err
    assert err.count("tokens per step") == 2  # one status line per answer: "unread" was not


def test_reset_forgets_but_keeps_the_system_message(model: Model) -> None:
    conversation = _conversation(model)
    conversation.system = "be kind"
    _say(conversation, "hello")
    assert run_command(Chat(conversation), "/reset")
    assert conversation.messages == [] and conversation.system == "be kind"
    _say(conversation, "hello")
    assert conversation.last is not None and conversation.last.prompt_tokens == 9 + 5 + 3


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = _conversation(model, max_tokens=100)
    original = Conversation.say

    def say(self: Conversation, text: str) -> object:
        for index, chunk in enumerate(original(self, text)):
            if text == "first" and index == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield chunk

    monkeypatch.setattr(Conversation, "say", say)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    handler = signal.getsignal(signal.SIGINT)
    chat_module.run(Chat(conversation))
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped" in capsys.readouterr().err
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2


def test_a_second_ctrl_c_while_text_is_printed_keeps_what_was_said(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises in `print`, outside of the stream, which must be closed all the same."""
    conversation = _conversation(model, max_tokens=100)
    printed: list[str] = []

    def impatient(text: str = "", **options: object) -> None:
        if options.get("file") is None:
            printed.append(text)
            if len(printed) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console, "print", impatient, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
    chat_module.run(Chat(conversation))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.last is not None and conversation.last.generated_tokens == 3
    assert not conversation.cache.in_use


def test_that_drafting_does_not_pay_is_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = CostTable({n: float(n) for n in (1, 2, 4, 8, 64)}, {1: 1.0}, {1: 1.0})
    monkeypatch.setattr("redrafter_mlx.model.cost_table", lambda *_: table)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    assert main(["chat", "--model", str(folder), "--max-tokens", "4", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert err.count("tokens per step") == 3
    assert err.count("drafter does not pay") == 1 and "does not pay" not in out


@pytest.mark.parametrize(("options", "notes"), [([], 1), (["--draft", "off"], 0), (["--drafter", "none"], 0)])
def test_a_model_without_a_drafter_says_so_once(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    notes: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("drafter"))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--model", str(bare), "--max-tokens", "4", *options]) == 0
    assert capsys.readouterr().err.count("has no drafter") == notes


@pytest.mark.parametrize(
    ("events", "answered"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt, "unread"], 0),
        ([KeyboardInterrupt, "read", KeyboardInterrupt, "read", EOFError, "unread"], 2),
    ],
)
def test_two_ctrl_c_in_a_row_leave(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    events: list[object],
    answered: int,
) -> None:
    waiting = iter(events)

    def read(begin: str = "") -> str:
        event = next(waiting)
        if isinstance(event, str):
            return event
        raise event  # type: ignore[misc]

    monkeypatch.setattr(chat_module, "_read_line", read)
    conversation = _conversation(model, max_tokens=2)
    chat_module.run(Chat(conversation))
    assert len(conversation.messages) == 2 * answered
