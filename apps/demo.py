"""`redrafter demo`: one answer with its drafted tokens marked, then plain against drafted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import write_answer
from .piped import read_prompt

if TYPE_CHECKING:
    from redrafter_mlx.generation import Chunk, Model
    from redrafter_mlx.measure.divergence import Divergence
    from redrafter_mlx.stats import Stats

PROMPTS = (
    "Explain in three short paragraphs why the sky is blue.",
    "Write a packing list for a week of hiking in the mountains.",
    "What is the difference between a list and a tuple in Python? Give an example.",
    "Tell me a short story about a lighthouse keeper and a whale.",
)

SHOWN = "4x5@8"
"""The draft whose accepted tokens are marked where `auto` is asked for, which may find that drafting does not pay."""


def demo(
    prompt: Annotated[
        str | None, typer.Argument(help=f"What to ask; text piped in joins it. Default: {PROMPTS[0]}")
    ] = None,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = None,
    lookup: opt.LookupOption = True,
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
    loaded = opt.load_model(model, drafter, lookup)
    if loaded.drafter is None and loaded.lookup is None:
        raise ValueError(f"--model {model} comes without a drafter: give one with --drafter")
    from redrafter_mlx import stream_generate

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    # auto may find that drafting does not pay here; the marks are to be seen all the same
    shown = SHOWN if draft == "auto" else draft
    # mistakes come before any output
    stream = stream_generate(loaded, asked, max_tokens=max_tokens, draft=shown)
    print(f"\n{asked}\n(accepted by the target: {legend(loaded, color)})\n")
    mark_drafted(stream, color)
    return _compare(loaded, (asked, *PROMPTS[1:]), [draft, *({shown} - {draft})], max_tokens)


def legend(model: Model, color: bool) -> str:
    """What the marks mean."""
    parts = []
    if model.drafter is not None:
        parts.append(f"drafted by the drafter {'in green' if color else 'in [brackets]'}")
    if model.lookup is not None:
        parts.append(f"looked up in the text {'in cyan' if color else 'in {braces}'}")
    return ", ".join(parts)


def mark_drafted(stream: Iterable[Chunk], color: bool) -> None:
    """Print a stream with its runs of accepted draft tokens between marks, by what drafted them."""
    source = None
    for chunk in stream:
        if chunk.text and chunk.source != source:
            print(_marks(source, color)[1] + _marks(chunk.source, color)[0], end="")
            source = chunk.source
        write_answer(chunk.text)
    print(_marks(source, color)[1], end="\n\n", flush=True)


def _marks(source: str | None, color: bool) -> tuple[str, str]:
    if source is None:
        return "", ""
    if color:
        return ("\x1b[36m" if source == "lookup" else "\x1b[32m"), "\x1b[0m"
    return ("{", "}") if source == "lookup" else ("[", "]")


def _compare(model: Model, prompts: tuple[str, ...], drafts: list[str], max_tokens: int) -> int:
    """Decode every prompt plainly and with every draft, in turn; 0 unless a text differs that must not."""
    from redrafter_mlx import generate

    arms = ["off", *drafts]
    runs: dict[str, list[Stats]] = {arm: [] for arm in arms}
    for arm in arms:
        generate(model, prompts[0], max_tokens=8, draft=arm)  # warm
    for index, prompt in enumerate(prompts):
        for arm in arms[index % len(arms) :] + arms[: index % len(arms)]:
            _, stats = generate(model, prompt, max_tokens=max_tokens, draft=arm)
            runs[arm].append(stats)
    _table(runs)
    found = _divergences(model, prompts, runs)
    dtype = str(model.target.dtype).removeprefix("mlx.core.")
    print(f"{model.target.name}, {dtype}, {len(prompts)} prompts, identical: {'no' if found else 'yes'}")
    is_float32 = dtype == "float32"
    for where, each in found:
        verdict = f" ({'a tie' if each.is_tie else 'no tie'} in float32)" if is_float32 else ""
        print(f"  {where}: {each}{verdict}")
    if not found or (is_float32 and all(each.is_tie for _, each in found)):
        return 0
    if not is_float32:
        print(f"In {dtype} one row and several rows may be rounded differently, so that texts may differ.")
        return 0
    print("error: in float32 texts may differ only from a tie on; please report this", file=sys.stderr)
    return 1


def _divergences(
    model: Model, prompts: Sequence[str], runs: dict[str, list[Stats]]
) -> list[tuple[str, Divergence]]:
    """Every drafted text that is not the plain one: which it is, and where it parts."""
    from redrafter_mlx import Sampling
    from redrafter_mlx.generation import encode
    from redrafter_mlx.measure.divergence import divergence

    found = []
    for arm in list(runs)[1:]:
        for number, (prompt, plain, drafted) in enumerate(
            zip(prompts, runs["off"], runs[arm], strict=True), 1
        ):
            ids = encode(model, prompt)
            each = divergence(model.target, Sampling(), ids, plain.token_ids, drafted.token_ids)
            if each is not None:
                found.append((f"prompt {number}, {arm}", each))
    return found


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
