"""Draws docs/demo.svg: what `redrafter demo` prints for the default model.

Run: python docs/make_demo_svg.py. The picture loads nothing from other hosts. Its figures are those of the machine and
the moment in which it was drawn.
"""

from __future__ import annotations

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
    Path(__file__).with_name("demo.svg").write_text(
        "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
