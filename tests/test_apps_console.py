"""Tables in any width: no figure is ever cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from apps.console import print_table, stdout

HEADER = ("", "tokens/s", "tokens per step", "speed-up")
ROWS = [("plain", "12345.6", "1.00", "1.00x"), ("drafted (4x5@8)", "6.5", "2.31", "0.00x")]


@pytest.mark.parametrize("width", [10, 20, 30, 40, 58, 59, 80])
def test_every_figure_is_whole(width: int) -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=width), "model", HEADER, ROWS)
    text = out.getvalue()
    assert all(figure in text for row in ROWS for figure in row[1:]) and "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert ("┃" in text) == (width >= 59), "a frame where there is room for one"


def test_a_reader_that_leaves_is_not_an_exit_code_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> Any:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Left())
    with pytest.raises(BrokenPipeError):
        stdout().print("x")
