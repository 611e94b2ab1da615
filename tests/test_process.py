"""How a command ends: exit codes, closed streams, Ctrl-C wherever it falls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redrafter_mlx import process

ROOT = Path(__file__).parent.parent


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (raising(ValueError("width must be 1")), 2, "error: width must be 1\n"),
        (raising(FileNotFoundError("no file x")), 2, "error: no file x\n"),
        (raising(OSError(28, "No space")), 2, "error: the output cannot be written: No space\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_codes_and_words(
    command: Callable[[], int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert process.run(command) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        process.run(raising(KeyError(3)))


def test_ctrl_c_is_one_word_whatever_it_is_turned_into(capsys: pytest.CaptureFixture[str]) -> None:
    """As by an extension module that cannot be imported because of it."""

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None
        return 0

    before = signal.getsignal(signal.SIGINT)
    assert process.run(command, "stopped, nothing lost") == 130
    assert capsys.readouterr().err == "stopped, nothing lost\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_where_python_swallows_it_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def command() -> int:
        Swallows()
        time.sleep(30)
        return 0

    assert process.run(command) == 130
    assert capsys.readouterr().err == "interrupted\n"


def python(code: str, redirect: str) -> subprocess.CompletedProcess[bytes]:
    shell = f'"$0" -c "$1" {redirect}'
    given = ["sh", "-c", shell, sys.executable, f"from redrafter_mlx import process; {code}"]
    environment = {**os.environ, "REDRAFTER_BLAS": "off"}
    return subprocess.run(given, cwd=ROOT, capture_output=True, env=environment)


def test_closed_streams_have_a_place() -> None:
    """File 0 is not for the next file that is opened, which MLX could not read."""
    code = "raise SystemExit(process.run(lambda: open('README.md').fileno() - 3))"
    done = python(code, "<&-")
    assert (done.returncode, done.stderr) == (0, b"")
    done = python("raise SystemExit(process.run(lambda: 0))", ">&-")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"standard output" in done.stderr
    assert python("raise SystemExit(process.run(lambda: int('x')))", "2>&-").returncode == 2


def test_a_reader_that_leaves_and_a_full_disk() -> None:
    many = "raise SystemExit(process.run(lambda: [print('x' * 99) for _ in range(10**4)] and 0))"
    done = python(many, "| true")
    assert (done.stdout, done.stderr) == (b"", b"")
    if Path("/dev/full").exists():
        done = python(many, "> /dev/full")
        assert done.returncode == 2 and done.stderr.startswith(b"error: the output cannot be written")
        assert done.stderr.count(b"\n") == 1


def test_characters_that_the_output_cannot_hold_are_replaced() -> None:
    shell = 'PYTHONIOENCODING=latin-1 "$0" -c "$1"'
    code = "from redrafter_mlx import process; process.run(lambda: print('caf\u00e9 \u4e2d') or 0)"
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=ROOT, capture_output=True)
    assert done.stdout == b"caf\xe9 ?\n" and done.stderr == b""


@pytest.mark.parametrize(
    ("script", "is_ours"),
    [
        ("/usr/bin/redrafter", True),
        ("redrafter-convert.exe", True),
        ("/x/apps/__main__.py", True),
        ("/x/mine/__main__.py", False),
        ("redrafter.py", False),
        ("", False),
    ],
)
def test_only_our_commands_end_at_once_while_they_are_imported(
    script: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(sys, "argv", [script])
        process.guard_imports()
        assert (signal.getsignal(signal.SIGINT) is process._leave) == is_ours
    finally:
        signal.signal(signal.SIGINT, before)
