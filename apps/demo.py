"""`redrafter demo`: one answer with its drafted tokens marked, then plain against drafted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import write_answer
from .piped import read_prompt

if TYPE_CHECKING:
    from redrafter_mlx.generation import Chunk, Model
    from redrafter_mlx.stats import Stats

PROMPTS = (
    "Explain in three short paragraphs why the sky is blue.",
    "Write a packing list for a week of hiking in the mountains.",
    "What is the difference between a list and a tuple in Python? Give an example.",
    "Tell me a short story about a lighthouse keeper and a whale.",
)


SHOWN = "4x5@8"


def demo(
    prompt: Annotated[
        str | None, typer.Argument(help=f"What to ask; text piped in joins it. Default: {PROMPTS[0]}")
    ] = None,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = None,
    draft: opt.DraftOption = "auto",
    max_tokens: opt.MaxTokensOption = 64,
) -> int:
    """Stream an answer with the drafted tokens marked, then compare with plain decoding."""
    opt.check_draft(draft)
    opt.check_max_tokens(max_tokens)
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty: it needs some text")
    asked = PROMPTS[0] if prompt is None else read_prompt(prompt) or PROMPTS[0]
    if draft == "off":
        raise ValueError("--draft off leaves nothing to compare: give auto, WxL or WxL@N")
    loaded = opt.load_model(model, drafter)
    if loaded.drafter is None:
        raise ValueError(f"--model {model} comes without a drafter: give one with --drafter")
    from redrafter_mlx import stream_generate

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    mark = "in green" if color else "in [brackets]"
    # auto may find that drafting does not pay here; the marks are to be seen all the same
    shown = SHOWN if draft == "auto" else draft
    stream = stream_generate(
        loaded, asked, max_tokens=max_tokens, draft=shown
    )  # mistakes come before any output
    print(f"\n{asked}\n(drafted by the drafter and accepted by the target: {mark})\n")
    mark_drafted(stream, color)
    return _compare(loaded, (asked, *PROMPTS[1:]), [draft, *({shown} - {draft})], max_tokens)


def mark_drafted(stream: Iterable[Chunk], color: bool) -> None:
    """Print a stream with its runs of accepted draft tokens between marks."""
    begin, end = ("\x1b[32m", "\x1b[0m") if color else ("[", "]")
    inside = False
    for chunk in stream:
        if chunk.text and chunk.from_draft != inside:
            print(begin if chunk.from_draft else end, end="")
            inside = chunk.from_draft
        write_answer(chunk.text)
    print(end if inside else "", end="\n\n", flush=True)


def _compare(model: Model, prompts: tuple[str, ...], drafts: list[str], max_tokens: int) -> int:
    """Decode every prompt in all ways, taking turns in who goes first; 0 when the promise held."""
    from redrafter_mlx import generate

    ways = ["off", *drafts]
    runs: dict[str, list[Stats]] = {way: [] for way in ways}
    for way in ways:
        generate(model, prompts[0], max_tokens=8, draft=way)  # warm
    for index, prompt in enumerate(prompts):
        for way in ways[index % len(ways) :] + ways[: index % len(ways)]:
            _, stats = generate(model, prompt, max_tokens=max_tokens, draft=way)
            runs[way].append(stats)
    answers = {way: [stats.token_ids for stats in runs[way]] for way in ways}
    identical = all(answers[way] == answers["off"] for way in drafts)
    _table(runs)
    dtype = str(model.target.dtype).removeprefix("mlx.core.")
    print(f"{model.target.name}, {dtype}, {len(prompts)} prompts, identical: {_yes(identical)}")
    if identical:
        return 0
    if dtype != "float32":
        print(
            f"In {dtype} one row and several may be rounded differently: the texts may part where "
            "the two best tokens are closer than that. In float32 they are equal."
        )
        return 0
    print("error: in float32 the texts must be equal; please report this", file=sys.stderr)
    return 1


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(runs: dict[str, list[Stats]]) -> None:
    from redrafter_mlx.stats import Stats

    from .console import print_table, stdout

    sums = {way: Stats() for way in runs}
    for way, all_stats in runs.items():
        for stats in all_stats:
            sums[way].add(stats)
    rows, plain = [], sums["off"].tokens_per_second
    for way, total in sums.items():
        rate = total.tokens_per_second
        label = "plain" if way == "off" else f"drafted ({way})"
        speedup = f"{rate / plain if plain else 0.0:.2f}x"
        rows.append((label, f"{rate:.1f}", f"{total.tokens_per_step:.2f}", speedup))
    print_table(stdout(), "", ("", "tokens/s", "tokens per step", "speed-up"), rows)
