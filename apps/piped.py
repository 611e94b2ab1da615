"""Standard input that is no terminal: text that joins a prompt, or the lines of a conversation."""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from typing import cast

from redrafter_mlx.prompts import check_text, decode_text

from .console import note

NAME = "standard input"
PATIENCE_SECONDS = 3.0
"""How long a prompt waits for the first byte of a pipe: programs start others with a pipe into which nothing comes."""


def read_prompt(prompt: str | None) -> str | None:
    """A prompt with the text that is piped in behind it, a blank line between; "-" is the piped text alone.

    Returns:
        None where there is neither.

    Raises:
        ValueError: one of them is not UTF-8.
    """
    if prompt == "-":
        return read_all()
    if prompt is None:
        return None if sys.stdin is None or sys.stdin.isatty() else read_all()
    check_text(prompt, "the prompt")
    piped = read_all() if _brings_text() else ""
    return f"{prompt}\n\n{piped}" if piped.strip() else prompt


def read_all() -> str:
    """All of standard input as text, without the line end at its end.

    Raises:
        ValueError: it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise ValueError("no prompt: standard input is closed")
    buffer = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if buffer is None else decode_text(buffer.read(), NAME)
    return text.removesuffix("\n")


def read_line() -> str:
    """The next line, without its end.

    Raises:
        EOFError: there is none.
        ValueError: it is not UTF-8; the next call goes on behind it.
    """
    if sys.stdin is None:
        raise EOFError
    buffer = getattr(sys.stdin, "buffer", None)
    line = sys.stdin.readline() if buffer is None else buffer.readline()
    if not line:
        raise EOFError
    text = decode_text(line, "the message") if isinstance(line, bytes) else line
    return text.removesuffix("\n")


def note_if_ignored(reason: str) -> None:
    """Say that text waits on standard input which nothing will read."""
    if not _is_file_or_pipe() or not select.select([sys.stdin], [], [], 0)[0]:
        return
    if cast(io.BufferedReader, sys.stdin.buffer).peek(1):  # not at its end
        note(f"{NAME} is not read: {reason}")


def _brings_text() -> bool:
    """Whether a file or a pipe is there to be read, and, of a pipe, whether something comes soon."""
    if not _is_file_or_pipe():
        return False
    if select.select([sys.stdin], [], [], PATIENCE_SECONDS)[0]:
        return True
    note(f"nothing came on {NAME} within {PATIENCE_SECONDS:.0f} s, so it is not read")
    return False


def _is_file_or_pipe() -> bool:
    """False for a terminal, for devices such as /dev/null, and where it is closed or no file at all."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
