"""A conversation's terminal: the line that is typed, and the status line below an answer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .chat_commands import COMMANDS, LEAVING
from .console import columns

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.key_binding import KeyBindings

    from redrafter_mlx.stats import Stats

UPDATES_PER_SECOND = 8
_WITH_PATHS = ("/file ", "/save ", "/load ")


def is_terminal() -> bool:
    """Whether somebody types here, at a terminal that can move its cursor."""
    return bool(
        sys.stdin is not None
        and sys.stdin.isatty()
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def has_color() -> bool:
    """Whether colors are wanted (no-color.org)."""
    return not os.environ.get("NO_COLOR")


def message_reader(status: Callable[[], str]) -> Callable[[str], str]:
    """A function that reads a message, which begins with the text it is given: with history, completion and pastes.

    Args:
        status: what stands below what is typed.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    from redrafter_mlx.files import cache_dir

    path = cache_dir() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation=lambda width, line, wrapped: "" if wrapped else ". ",
        history=FileHistory(str(path)),
        completer=_completer(),
        complete_while_typing=False,
        key_bindings=_keys(),
        bottom_toolbar=lambda: status()[: columns() - 1],
        mouse_support=False,
    )
    return lambda begin: session.prompt(default=begin).strip()


def _keys() -> KeyBindings:
    """Enter sends, unless the line ends in a backslash; Alt-Enter begins a new line.

    An Enter that is typed while an answer is written arrives as Ctrl-J, as the terminal was not yet in raw mode.
    """
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _completer() -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """Names of commands, and paths behind those that take one."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            if text.startswith(_WITH_PATHS):
                rest = text.partition(" ")[2]
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)
            elif text.startswith("/") and " " not in text:
                for name in (*COMMANDS, *LEAVING):
                    if name.startswith(text):
                        yield Completion(name, start_position=-len(text))

    return Commands()


class StatusLine:
    """Figures in the terminal's last row while an answer is written in the rows above, which scroll without it."""

    def __init__(self) -> None:
        self._size = (0, 0)
        self._next = 0.0

    def show(self, stats: Stats) -> None:
        """Write the figures, a few times a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 1 / UPDATES_PER_SECOND
        size = os.get_terminal_size(sys.stdout.fileno())
        width, height = size
        if height < 4 or width < 10:
            return
        out = ""
        if size != self._size:  # also after a change of the size, which gives the rows free
            self._size = (width, height)
            # A row is made below the cursor; then all rows but the last scroll (DECSTBM), which moves the cursor.
            out = f"\x1bD\x1b[1A\x1b7\x1b[J\x1b[1;{height - 1}r\x1b8"
        text = live(stats)[: width - 1]
        sys.stdout.write(f"{out}\x1b7\x1b[{height};1H\x1b[2K\x1b[2m{text}\x1b[0m\x1b8")
        sys.stdout.flush()

    def close(self) -> None:
        """Give the last row back."""
        if self._size != (0, 0):
            sys.stdout.write("\x1b7\x1b[r\x1b8\x1b[J")
            sys.stdout.flush()


def live(stats: Stats) -> str:
    """The figures of an answer that is being written."""
    return (
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_step:.2f} tokens per step, {stats.reused_tokens} of {stats.prompt_tokens} reused"
    )


@contextmanager
def status_line() -> Iterator[StatusLine]:
    """A status line, and keys that are pressed meanwhile do not appear in the answer: they are for the next message."""
    import termios

    line = StatusLine()
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    quiet = list(before)
    quiet[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, quiet)
    try:
        yield line
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)
        line.close()
