"""Runs `redrafter` and `redrafter-convert` in this process, as a shell would: bytes in, bytes out, an exit code."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from apps.cli import main as redrafter_main
from convert.__main__ import main as convert_main

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Result:
    code: int
    """1 with a traceback on `err` where an exception came through, as the interpreter does it."""
    out: str
    err: str

    def line(self) -> dict[str, Any]:
        """The JSON object of the last line on stdout."""
        assert self.code == 0, self
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    @property
    def tokens(self) -> list[int]:
        found = self.line()["token_ids"]
        assert isinstance(found, list)
        return found


def redrafter(*arguments: object, stdin: bytes | None = None) -> Result:
    """`redrafter` with these arguments; without `stdin` it is closed."""
    return _run(redrafter_main, arguments, stdin)


def convert(*arguments: object) -> Result:
    """`redrafter-convert` with these arguments."""
    return _run(convert_main, arguments, None)


def convert_within(seconds: float, *arguments: object) -> Result:
    """`redrafter-convert` in a process of its own, for input with which it might never end, or take all memory."""
    given = [sys.executable, "-m", "convert", *map(str, arguments)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=seconds, preexec_fn=limit)
    return Result(done.returncode, done.stdout, done.stderr)


def _run(main: Any, arguments: tuple[object, ...], stdin: bytes | None) -> Result:
    given = [os.fsdecode(each) if isinstance(each, (bytes, Path)) else str(each) for each in arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    read = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with mock.patch.multiple(sys, stdin=read, stdout=out, stderr=err):
        try:
            code = main(given)
        except Exception:  # what the interpreter would print
            traceback.print_exc()
            code = 1
    return Result(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(errors="replace")


def generate(model: Path, *more: object, prompt: object = "hi") -> Result:
    """`redrafter generate --json` of four tokens, unless the options say otherwise."""
    return redrafter("generate", "--model", model, "--max-tokens", 4, "--json", *more, prompt)


def refused(result: Result, *names: str) -> None:
    """Check the one right way to refuse: code 2, nothing on stdout, one last line `error: ...` that names things."""
    assert "Traceback" not in result.err, result.err
    assert result.code == 2 and not result.out.strip(), result
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and len(last) < 1000, result.err
    for name in names:
        assert name.lower() in last.lower(), last


def works_or_refused(result: Result) -> bool:
    """Check that it worked or was refused in the one right way; True where it worked."""
    if result.code:
        refused(result)
    assert "Traceback" not in result.err, result.err
    return result.code == 0
