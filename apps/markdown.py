"""Markdown as it streams: word by word, styled and wrapped, without ever moving the cursor back.

So it survives any width and any change of it: what is written belongs to the terminal, and the next word is wrapped at
the width that there is then. Headings, lists, quotes, rules, fenced and inline code, bold and italics are styled; of
anything else the source is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.cells import cell_len

from .console import visible

RESET = "\x1b[0m"
BOLD, DIM, ITALIC, CODE = "1", "2", "3", "33"
_DRAFTED, _COLORS = "32", {"lookup": "36"}
"""Green what a drafter drafted and cyan what was looked up, as in `demo`."""

LONGEST_WORD = 24
"""Characters of a word that are held back, as it may have to go to the next line."""

_MARKS = "*_`"
_MARKER = re.compile(r"(\*\*|__|`|\*|_)")
_LIST_ITEM = re.compile(r"(?:[-*+]|\d{1,3}[.)])$")


@dataclass
class MarkdownStream:
    """Gets an answer in pieces and writes it styled.

    Args:
        write: takes text for the terminal.
        width: the terminal's columns at present.
        shows_drafts: color accepted draft tokens by what drafted them.
    """

    write: Callable[[str], None]
    width: Callable[[], int]
    shows_drafts: bool = True
    _word: list[tuple[str, str | None]] = field(default_factory=list)
    """The characters of the word that is not complete yet, each with what drafted it."""
    _column: int = 0
    _indent: str = ""
    """What begins the next line of a paragraph that is wrapped."""
    _gap: str = ""
    """Spaces before the word that comes next, left out where the line breaks."""
    _skips_gap: bool = False
    """The gap belongs to a mark at the beginning of the line, such as a heading's."""
    _is_line_start: bool = True
    _in_fence: bool = False
    _line: set[str] = field(default_factory=set)
    """Styles of the rest of the line."""
    _inline: dict[str, str] = field(default_factory=dict)
    """Open inline markers and their styles."""

    def add(self, text: str, source: str | None = None) -> None:
        """Write what of the answer so far has become complete words; `source` drafted this piece."""
        for character in visible(text):
            if character == "\n":
                self._end_word()
                self._end_line()
            elif character in " \t" and not (self._in_fence and not self._is_line_start):
                self._end_word()
                self._gap += character
            else:
                self._word.append((character, source))
                if (self._in_fence and not self._may_be_fence()) or self._is_long(character):
                    self._end_word()

    def finish(self) -> None:
        """Write what is left, and end the last line."""
        self._end_word()
        if self._column:
            self._break()

    def _is_long(self, last: str) -> bool:
        """Whether a word is to be shown before it ends: Chinese has no spaces, and the longest words are addresses."""
        return last not in _MARKS and (len(self._word) >= LONGEST_WORD or cell_len(last) == 2)

    def _may_be_fence(self) -> bool:
        text = self._text()
        return self._is_line_start and ("```".startswith(text) or text.startswith("```"))

    def _text(self) -> str:
        return "".join(character for character, _ in self._word)

    def _end_line(self) -> None:
        self._break()
        self._is_line_start, self._gap, self._indent = True, "", ""
        self._line.clear()
        self._inline.clear()

    def _break(self) -> None:
        self.write("\n")
        self._column = 0

    def _end_word(self) -> None:
        if not self._word:
            return
        word, text, gap = self._word, self._text(), "" if self._skips_gap else self._gap
        self._word, self._gap, self._skips_gap = [], "", False
        if self._is_line_start:
            self._is_line_start = False
            if text.startswith("```"):
                self._in_fence = not self._in_fence
                self._put(gap, [(text, None, {DIM})])
                return
            if not self._in_fence and self._begin_line(text, gap):
                self._skips_gap = True
                return
        if self._in_fence:
            self._put(gap, [(character, source, {CODE}) for character, source in word])
        else:
            self._put_word(gap, word)

    def _begin_line(self, text: str, gap: str) -> bool:
        """Take the first word of a line as the mark of what the line is; False where it is none."""
        if re.fullmatch(r"#{1,6}", text):
            self._line.add(BOLD)
        elif text in ("---", "***", "___"):
            self._put("", [("─" * max(1, self.width() - 1), None, {DIM})])
        elif text == ">":
            self._indent = f"{gap}│ "
            self._line.update((DIM, ITALIC))
            self._put("", [(self._indent, None, {DIM})])
        elif _LIST_ITEM.fullmatch(text):
            mark = "•" if text in "-*+" else text
            self._indent = gap + " " * (cell_len(mark) + 1)
            self._put(gap, [(f"{mark} ", None, set())])
        else:
            return False
        return True

    def _put_word(self, gap: str, word: list[tuple[str, str | None]]) -> None:
        """A word of running text, wrapped at the width, its inline markers taken out."""
        cells: list[tuple[str, str | None, set[str]]] = []
        at = 0
        for piece in _MARKER.split("".join(character for character, _ in word)):
            if self._is_marker(piece, at, len(word)):
                self._toggle(piece)
            else:
                styles = {*self._inline.values(), *self._line}
                cells += [(character, source, styles) for character, source in word[at : at + len(piece)]]
            at += len(piece)
        size = cell_len("".join(character for character, _, _ in cells))
        if self._column > cell_len(self._indent) and self._column + cell_len(gap) + size >= self.width():
            self._break()
            self._put("", [(self._indent, None, self._line)])
            gap = ""
        self._put(gap, cells)

    def _is_marker(self, piece: str, at: int, size: int) -> bool:
        """Whether it opens or closes something here: not inside code, and _ and * only at a word's edges."""
        if not _MARKER.fullmatch(piece):
            return False
        if "`" in self._inline:
            return piece == "`"
        at_edge = at == 0 or at + len(piece) == size or piece in self._inline
        return piece in ("`", "**") or (at_edge and size > len(piece))

    def _toggle(self, marker: str) -> None:
        style = {"`": CODE, "**": BOLD, "__": BOLD}.get(marker, ITALIC)
        if self._inline.pop(marker, None) is None:
            self._inline[marker] = style

    def _put(self, gap: str, cells: list[tuple[str, str | None, set[str]]]) -> None:
        """Write texts, each with what drafted it and its styles; runs of a style share their escape sequence."""
        out, open_codes = gap, ""
        for text, source, styles in cells:
            wanted = styles
            if source is not None and self.shows_drafts:
                wanted = {_COLORS.get(source, _DRAFTED), *styles} - {CODE}
            codes = ";".join(sorted(wanted))
            if codes != open_codes:
                out += (RESET if open_codes else "") + (f"\x1b[{codes}m" if codes else "")
                open_codes = codes
            out += text
        self.write(out + (RESET if open_codes else ""))
        self._column += cell_len(gap) + sum(cell_len(text) for text, _, _ in cells)
