"""Streamed Markdown: the same text in any pieces, wrapped between words, styled."""

from __future__ import annotations

import random
import re

import pytest

from apps.markdown import MarkdownStream

ANSWER = """# A title

Some **bold words** and `a_b * c` code, *slanted*, snake_case and 2 * 3.

- first item that is long enough to wrap
- second
  1. nested one

> a quote

```python
def f(x):
    return x  # not a heading
```
The end."""


def written(pieces: list[tuple[str, str | None]], width: int = 80, shows_drafts: bool = True) -> str:
    out: list[str] = []
    stream = MarkdownStream(out.append, lambda: width, shows_drafts)
    for text, source in pieces:
        stream.add(text, source)
    stream.finish()
    return "".join(out)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_the_text_is_that_of_the_source_without_its_marks() -> None:
    assert (
        plain(written([(ANSWER, None)]))
        == """A title

Some bold words and a_b * c code, slanted, snake_case and 2 * 3.

• first item that is long enough to wrap
• second
  1. nested one

│ a quote

```python
def f(x):
    return x  # not a heading
```
The end.
"""
    )


@pytest.mark.parametrize("width", [12, 40, 80])
def test_any_pieces_give_the_same(width: int) -> None:
    rng, whole = random.Random(width), written([(ANSWER, None)], width)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(ANSWER)), 9))
        pieces = [(ANSWER[a:b], None) for a, b in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True)]
        assert written(pieces, width) == whole


@pytest.mark.parametrize("width", [10, 20, 40])
def test_lines_break_between_words(width: int) -> None:
    text = "several words of text and 中文字 too " * 4
    lines = plain(written([("- " + text, None)], width)).splitlines()
    assert "".join("".join(lines).split()) == "".join(("• " + text).split())
    assert len(lines) > 2 and all(line.startswith(("• ", "  ")) for line in lines)


def test_text_without_spaces_does_not_wait_for_its_end() -> None:
    out: list[str] = []
    stream = MarkdownStream(out.append, lambda: 20)
    stream.add("中文" * 20)
    assert "".join(out).replace("\n", "") == "中文" * 20
    assert all(len(line) <= 10 for line in "".join(out).splitlines())
    stream.add("x" * 30)
    assert "".join(out).count("x") == 24


def test_control_characters_of_a_model_do_nothing() -> None:
    assert written([("a\x1b[2Jb\x07\x9bc\n", None)]) == "a\ufffd[2Jb\ufffd\ufffdc\n"


def test_styles() -> None:
    assert written([("**a** `b`", None)]) == "\x1b[1ma\x1b[0m \x1b[33mb\x1b[0m\n"
    assert written([("# t", None)]) == "\x1b[1mt\x1b[0m\n"


def test_accepted_draft_tokens_are_colored() -> None:
    pieces = [("one", None), (" two", "recurrent"), ("!", "lookup")]
    assert written(pieces) == "one \x1b[32mtwo\x1b[0m\x1b[36m!\x1b[0m\n"
    assert written(pieces, shows_drafts=False) == "one two!\n"
