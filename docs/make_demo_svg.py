"""Draws docs/demo.svg: an answer of the default model with its drafted and accepted tokens marked.

Run: python docs/make_demo_svg.py. The picture loads nothing from other hosts.
"""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

import redrafter_mlx as rd

PROMPT = "Why is the sky blue?"


def main() -> None:
    model = rd.load()
    answer, drafted = Text(), 0
    chunks = list(rd.stream_generate(model, PROMPT, max_tokens=96, draft="4x5@8"))
    for chunk in chunks:
        answer.append(chunk.text, style="bold green" if chunk.from_draft else "")
        drafted += chunk.from_draft
    console = Console(record=True, width=92, file=Path("/dev/null").open("w"))
    console.print(f"$ redrafter demo {PROMPT!r}\n", style="bold")
    console.print(answer)
    stats = chunks[-1].stats
    console.print(
        f"\n{stats.generated_tokens} tokens in {stats.steps} steps; green: {drafted} drafted and accepted",
        style="dim",
    )
    svg = console.export_svg(title="redrafter-mlx")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("demo.svg").write_text(svg)


if __name__ == "__main__":
    main()
