"""`redrafter generate`: answers to one prompt or to a file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter_mlx.prompts import Request, check_text, read_requests

from . import options as opt
from .console import DrafterNotes, note_missing_drafter, write_answer
from .piped import note_if_ignored, read_prompt

if TYPE_CHECKING:
    from redrafter_mlx.generation import Chunk, Model, Options
    from redrafter_mlx.stats import Stats


def generate(  # noqa: PLR0913  (typer: one argument per option)
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to ask; text piped in joins it (cat FILE | redrafter generate 'explain'). "
            "- or nothing: the piped text alone.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL: strings, or objects with "prompt", "messages" or "turns".'),
    ] = None,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = None,
    lookup: opt.LookupOption = True,
    history: opt.HistoryOption = None,
    draft: opt.DraftOption = "auto",
    max_tokens: opt.MaxTokensOption = 256,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    stop: opt.StopOption = None,
    temperature: opt.TemperatureOption = 0.0,
    top_p: opt.TopPOption = 1.0,
    top_k: opt.TopKOption = 0,
    min_p: opt.MinPOption = 0.0,
    repetition_penalty: opt.RepetitionPenaltyOption = 1.0,
    seed: opt.SeedOption = None,
    kv_bits: opt.KVBitsOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per prompt: text, token_ids, stats.")
    ] = False,
) -> None:
    """Answer a prompt, standard input, or every prompt of a file."""
    requests = _requests(prompt, prompts)
    _check(requests, raw, system)
    sampling = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    options = opt.checked_options(draft, max_tokens, stop, sampling, kv_bits)
    loaded = opt.load_model(model, drafter, lookup, history)
    streams = _streams(loaded, requests, replace(options, raw=raw), system)
    note_missing_drafter(loaded, draft, drafter)
    write, notes, all_stats = _write_json if as_json else _write_text, DrafterNotes(loaded), []
    for index, pair in enumerate(streams):
        all_stats.append(write(index, *pair))
        notes.after_answer(all_stats[-1])
    print(summary(all_stats), file=sys.stderr)


def _requests(prompt: str | None, prompts: Path | None) -> list[Request]:
    """The prompt given with what is piped in, or the file's prompts."""
    if prompts is not None:
        if prompt is not None:
            raise ValueError(f"give a prompt or --prompts {prompts}, not both")
        requests = read_requests(prompts)
        note_if_ignored(f"the prompts come from {prompts}")
        return requests
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty: it needs some text")
    asked = read_prompt(prompt)
    if asked is None:
        raise ValueError("no prompt: give one as argument, with --prompts FILE, or on standard input")
    if not asked.strip():
        raise ValueError("the prompt is empty: it needs some text")
    return [Request(0, asked)]


def _check(requests: Sequence[Request], raw: bool, system: str | None) -> None:
    if system is not None:
        check_text(system, "--system")
    if raw and system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out")
    for index, request in enumerate(requests):
        if raw and not isinstance(request.prompt, str):
            raise ValueError(f"prompt {index} has messages, which need the chat template: no --raw")


def _streams(
    model: Model, requests: Sequence[Request], options: Options, system: str | None
) -> list[tuple[Request, Iterator[Chunk]]]:
    """A stream per request. All are checked before the first one runs."""
    from redrafter_mlx.generation import start

    streams = []
    for index, request in enumerate(requests):
        asked = request.prompt if system is None else request.messages(system)
        try:
            stream = start(model, asked, options)
        except ValueError as error:
            if len(requests) == 1:
                raise
            raise ValueError(f"prompt {index}: {error}") from None
        streams.append((request, stream))
    return streams


def _write_json(index: int, request: Request, stream: Iterator[Chunk]) -> Stats:
    chunks = list(stream)
    stats = chunks[-1].stats
    values = stats.to_dict()
    del values["token_ids"]  # stands beside the text
    line = {
        "index": index,
        "id": request.id,
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": stats.token_ids,
        "stats": values,
    }
    print(json.dumps(line), flush=True)
    return stats


def _write_text(index: int, request: Request, stream: Iterator[Chunk]) -> Stats:
    if index:
        print()
    for chunk in stream:
        write_answer(chunk.text)
    print(flush=True)
    return chunk.stats


def summary(all_stats: Sequence[Stats]) -> str:
    """What some generations took, in a line."""
    from redrafter_mlx.stats import Stats

    total = Stats()
    for stats in all_stats:
        total.add(stats)
    parts = [f"{len(all_stats)} prompts"] if len(all_stats) > 1 else []
    parts.append(f"{total.generated_tokens} tokens")
    if total.decode_seconds and total.steps:
        parts.append(f"{total.tokens_per_second:.1f} tokens/s")
        by = ", ".join(f"{source} {count}" for source, count in total.accepted_by_source.items())
        parts.append(f"{total.tokens_per_step:.2f} tokens per step{f' (drafted: {by})' if by else ''}")
    asked = sum(stats.prompt_tokens for stats in all_stats)
    reused = sum(stats.reused_tokens for stats in all_stats)
    prompt = f"prompt {asked} tokens{f' ({reused} reused)' if reused else ''}"
    parts.append(f"{prompt} in {total.prefill_seconds:.2f} s")
    if len(all_stats) == 1 and all_stats[0].seed is not None:
        parts.append(f"seed {all_stats[0].seed}")
    return ", ".join(parts)
