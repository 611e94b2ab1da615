"""How our commands begin and end as processes: standard streams, mistakes, Ctrl-C, a reader that leaves.

The package imports this module first, so that Ctrl-C during the rest of the imports is one word and not a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: of the user or in a file; 128 and the number of SIGINT."""

_SCRIPTS = ("redrafter", "redrafter-convert")
_PACKAGES = ("apps", "convert")


def guard_imports() -> None:
    """While one of our commands is imported, let Ctrl-C end it at once: nothing has been begun.

    In any other program, and where SIGINT is ignored or handled already, nothing changes.
    """
    folder, script = os.path.split(sys.argv[0] if sys.argv else "")
    is_package = script == "__main__.py" and os.path.basename(folder) in _PACKAGES
    is_ours = is_package or script.removesuffix(".exe") in _SCRIPTS
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def run(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of `command`, which returns 0 or a code of its own.

    ValueError and OSError are mistakes of the user or in a file: one line on stderr, code 2. A reader of the output
    that leaves, as `head` does, has seen enough: code 0. Ctrl-C is the line `interrupted`, code 130.
    """
    pressed: list[float] = []
    try:
        _open_streams()
        with _ctrl_c(pressed):
            code = command()
            _flush()
            return code
    except BrokenPipeError:
        _silence()
        return 0
    except KeyboardInterrupt:
        return _say(interrupted, INTERRUPTED)
    except (ValueError, OSError) as error:
        if not _just_now(pressed):
            return _say(f"error: {_message(error)}", MISTAKE)
    except BaseException:  # libraries turn the exception of Ctrl-C into their own, an ImportError, say
        if not _just_now(pressed):
            raise
    return _say(interrupted, INTERRUPTED)


def _just_now(pressed: list[float]) -> bool:
    """Whether Ctrl-C was pressed in the last seconds, and not earlier, when a conversation dealt with it."""
    return bool(pressed) and time.monotonic() - pressed[-1] < 5


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
        return f"the output cannot be written: {error.strerror}"
    return str(error)


def _say(line: str, code: int) -> int:
    """Say it on stderr, whatever has become of the streams, and return `code`."""
    try:
        print(line, file=sys.stderr)
        _flush()
    except OSError:
        _silence()
    return code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _open_streams() -> None:
    """Give closed standard streams a place, and let no character stop the output.

    A closed one would be the number of the next file that is opened: MLX refuses to read file 0, and what is said on
    stderr would go into a file.

    Raises:
        OSError: standard output is closed.
    """
    is_closed = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if is_closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
        raise OSError("standard output is closed: there is nowhere to write to")


def _silence() -> None:
    """Keep the interpreter from complaining, when it flushes at its end, of streams that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _ctrl_c(pressed: list[float]) -> Iterator[None]:
    """Note in `pressed` when Ctrl-C was pressed, and have it raise also where Python swallows what it raises."""

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(time.monotonic())
        raise KeyboardInterrupt

    def swallowed(what: Any) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            # In a callback of the import system or the collector: raised here, it would be swallowed again.
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(what)

    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before not in (signal.default_int_handler, _leave):  # ignored, as in the background, or the caller's
        yield
        return
    signal.signal(signal.SIGINT, press)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
