"""Draws docs/demo.svg: what `redrafter demo` prints for the default model.

Run: python docs/make_demo_svg.py. The picture loads nothing from other hosts. Its figures are those of the machine and
the moment in which it was drawn.
"""

from __future__ import annotations

import html
import io
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from redrafter_mlx.apps.cli import main as redrafter
from rich.console import Console
from rich.text import Text

PROMPT = "Why is the sky blue?"
COLUMNS = 92


class _Terminal(io.StringIO):
    """Collects output that is meant for a terminal, colors included."""

    def isatty(self) -> bool:
        return True


_TEXT = re.compile(
    r'<text (class="[^"]+") x="([\d.]+)" (y="[\d.]+") textLength="([\d.]+)" (clip-path="[^"]+")>([^<]*)</text>'
)
_WORD = re.compile(r"[\u2500-\u257f]|[^\s\u2500-\u257f]+")  # or one character of the table's lines


def _placed(text: re.Match[str]) -> str:
    """A text of rich's as words, each with its own x, and the lines of a table as characters.

    Many viewers drop the space at a text's begin, and do not stretch a text to its `textLength`: so words of another
    color would move into their neighbors, and the lines of a table out of their columns.
    """
    style, x, y, length, clip, escaped = text.groups()
    content = html.unescape(escaped)
    if not content.strip():
        return ""
    width = float(length) / len(content)
    words = [
        f'<tspan x="{float(x) + width * word.start():.5g}" textLength="{width * len(word[0]):.5g}">'
        f"{html.escape(word[0])}</tspan>"
        for word in _WORD.finditer(content)
    ]
    return f"<text {style} {y} {clip}>{''.join(words)}</text>"


def main() -> int:
    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    os.environ.pop("NO_COLOR", None)
    with redirect_stdout(_Terminal()) as terminal:
        code = redrafter(["demo", PROMPT])
    if code:
        return code
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f'$ redrafter demo "{PROMPT}"', style="bold"))
    console.print(Text.from_ansi(terminal.getvalue()))
    svg = console.export_svg(title="redrafter-mlx")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _TEXT.sub(_placed, svg)
    Path(__file__).with_name("demo.svg").write_text(
        "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
