"""Text that is piped in: it joins the prompt, and nothing of it is ignored."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apps import piped
from apps.piped import note_if_ignored, read_line, read_prompt


@contextmanager
def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, is_open: bool = False) -> Iterator[None]:
    """Standard input is a pipe with this in it; `is_open`: whoever writes it is still there."""
    reader, writer = os.pipe()
    os.write(writer, data)
    if not is_open:
        os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield
    if is_open:
        os.close(writer)


@pytest.mark.parametrize(
    ("prompt", "data", "asked"),
    [
        ("explain", b"def f(): pass\n", "explain\n\ndef f(): pass"),
        ("explain", b"", "explain"),
        ("explain", b" \n", "explain"),
        (None, b"\xef\xbb\xbfSay hi.\r\n", "Say hi."),
        ("-", b"two\r\nlines\n", "two\nlines"),
    ],
)
def test_prompt_and_piped_text(
    prompt: str | None, data: bytes, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stdin(monkeypatch, data):
        assert read_prompt(prompt) == asked


def test_a_file_joins_too_but_a_device_and_a_closed_stream_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("piped")
    for path, asked in ((tmp_path / "text", "a\n\npiped"), (Path("/dev/null"), "a")):
        with path.open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            assert read_prompt("a") == asked
    monkeypatch.setattr("sys.stdin", None)
    assert read_prompt("a") == "a" and read_prompt(None) is None
    with pytest.raises(ValueError, match="standard input is closed"):
        read_prompt("-")


def test_a_pipe_into_which_nothing_comes_does_not_hold_the_answer_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(piped, "PATIENCE_SECONDS", 0.01)
    with stdin(monkeypatch, b"", is_open=True):
        assert read_prompt("hi") == "hi"
    assert "nothing came on standard input" in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with stdin(monkeypatch, b"O\xf9 est"), pytest.raises(ValueError, match="byte 1 is 0xf9"):
        read_prompt("explain")
    with pytest.raises(ValueError, match="the prompt .* character 3 is the byte 0xe9"):
        read_prompt(os.fsdecode(b"caf\xe9"))


def test_lines_go_on_behind_one_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    with stdin(monkeypatch, b"\xef\xbb\xbffirst\r\ncaf\xe9 au lait\nthird"):
        assert read_line() == "first"
        with pytest.raises(ValueError, match="byte 3 is 0xe9"):
            read_line()
        assert read_line() == "third"
        with pytest.raises(EOFError):
            read_line()
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert read_line() == "x"


@pytest.mark.parametrize(("data", "notes"), [(b"text", 1), (b"", 0)])
def test_what_is_not_read_is_said(
    data: bytes, notes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stdin(monkeypatch, data):
        note_if_ignored("because")
    assert capsys.readouterr().err.count("standard input is not read: because") == notes
