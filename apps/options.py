"""The options that every command with a model shares: defined, checked and explained here once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter_mlx.prompts import check_text

if TYPE_CHECKING:
    from redrafter_mlx import Model
    from redrafter_mlx.generation import Options

DEFAULT_MODEL = "smollm2-135m-instruct"
_SAMPLING = "Sampling"

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Target model: a name, .gguf file, mlx-lm folder or Hugging Face id."),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="Drafter folder or Hugging Face id; lookup: only what is looked up in the text; none: no drafts; "
        "published: fetch the one published for the model. Default: the model's own.",
    ),
]
HistoryOption = Annotated[
    Path | None,
    typer.Option(
        "--history",
        help="Keep the tokens of prompts and answers in this folder (at most 200,000), to draft from later.",
    ),
]
LookupOption = Annotated[
    bool,
    typer.Option("--lookup/--no-lookup", help="Also draft what has stood in the text before."),
]
DraftOption = Annotated[
    str,
    typer.Option(
        "--draft",
        help="auto, off, WxL or WxL@N: W beams of L tokens (the root counts), N rows verified.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Random seed; the same seed gives the same text. Default: a new one.",
        rich_help_panel=_SAMPLING,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        "-t",
        help="Sampling temperature; 0 always takes the most likely token.",
        rich_help_panel=_SAMPLING,
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        help="Sample from the most likely tokens up to this total probability (1: all).",
        rich_help_panel=_SAMPLING,
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(help="Sample from the k most likely tokens (0: all).", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float,
    typer.Option(
        help="Drop tokens less likely than this share of the most likely one (0: none).",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        help="Divide the logits of tokens that were there already by this (1: do not).",
        rich_help_panel=_SAMPLING,
    ),
]


def _models(help: str, *names: str) -> Any:
    """An option whose default is the model's own."""
    return typer.Option(*names, help=f"{help} Default: the model's own.", rich_help_panel=_SAMPLING)


ModelsTemperatureOption = Annotated[
    float | None,
    _models("Sampling temperature; 0 always takes the most likely token.", "--temperature", "-t"),
]
ModelsTopPOption = Annotated[
    float | None, _models("Sample from the most likely tokens up to this total probability (1: all).")
]
ModelsTopKOption = Annotated[int | None, _models("Sample from the k most likely tokens (0: all).")]
ModelsMinPOption = Annotated[
    float | None, _models("Drop tokens less likely than this share of the most likely one (0: none).")
]
ModelsRepetitionPenaltyOption = Annotated[
    float | None, _models("Divide the logits of tokens that were there already by this (1: do not).")
]
MaxTokensOption = Annotated[int, typer.Option(help="Maximum tokens to generate.")]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the text before this string (may be given several times)."),
]
KVBitsOption = Annotated[
    int | None, typer.Option("--kv-bits", help="Quantize the KV cache to this many bits.")
]


def checked_options(
    draft: str,
    max_tokens: int,
    stop: list[str] | None,
    sampling: dict[str, Any],
    kv_bits: int | None,
) -> Options:
    """Options with these values of `Sampling`; None leaves one as it is by default.

    Raises:
        ValueError: an invalid option.
    """
    check_draft(draft)
    check_max_tokens(max_tokens)
    for text in stop or ():
        check_text(text, "--stop")
    from redrafter_mlx.generation import Options

    options = Options(max_tokens, draft=draft, stop=tuple(stop or ()), kv_bits=kv_bits)
    return with_sampling(options, {name: value for name, value in sampling.items() if value is not None})


def with_sampling(options: Options, values: dict[str, Any]) -> Options:
    """The options with another sampling.

    Raises:
        ValueError: an invalid value.
    """
    from redrafter_mlx import Sampling

    return replace(options, sampling=Sampling(**values))


def check_draft(draft: str) -> str:
    """Return `draft` if it is valid. Called before a model is loaded, which takes seconds.

    Raises:
        ValueError: it is not auto, off, WxL or WxL@N.
    """
    if draft not in ("auto", "off"):
        from redrafter_mlx import Beam

        Beam.parse(draft)
    return draft


def check_max_tokens(max_tokens: int) -> int:
    """Return `max_tokens` if it is valid.

    Raises:
        ValueError: it is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be 1 or more, not {max_tokens}")
    return max_tokens


def load_model(model: str, drafter: str | None, lookup: bool = True, history: Path | None = None) -> Model:
    """Load the target and the drafters that the options name.

    Freed memory is kept from here on: the process is a command of ours, so nobody else's malloc is changed.
    """
    import redrafter_mlx
    from redrafter_mlx.kernels import keep_freed_memory

    keep_freed_memory()
    return redrafter_mlx.load(model, drafter, lookup=lookup, history=history)
