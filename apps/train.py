"""`redrafter train`: self-distill a drafter for any target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .train_run import Wishes, run_training


def train(  # noqa: PLR0913  (typer: one argument per option)
    out: Annotated[Path, typer.Option(help="Folder for the drafter, its checkpoints and its data.")],
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File or folder of prompts (.jsonl, .txt). Default: the target writes its own."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Train on the text.npz of an earlier run instead of generating new answers."),
    ] = None,
    from_history: Annotated[
        Path | None,
        typer.Option(help="Train on the answers of your own use that `generate --history FOLDER` has kept."),
    ] = None,
    self_prompt: Annotated[
        int | None,
        typer.Option(
            help="Number of answers, to the target's own questions or to --prompts (default: 1000), or of --text (all)."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Instead of a number of answers: working time of the whole run, in minutes."),
    ] = None,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="Go on with a run that is too small to pay.")
    ] = False,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Prompts never to train on, such as a benchmark's (.jsonl, .txt)."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens per answer. Default: 160; not for --text.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Number of answers generated at the same time.")] = 96,
    disk_budget: Annotated[
        float | None,
        typer.Option(help="Stop generating text once its hidden states fill this many GB on the disk."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Number of passes over the text.")] = 2.0,
    batch: Annotated[int, typer.Option(help="Positions per batch, a multiple of 32.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    length: Annotated[int, typer.Option(help="Beam length to train for (the root counts).")] = 5,
    soft: Annotated[
        float,
        typer.Option(help="Weight of the target's distribution as training goal; the rest is on the tokens."),
    ] = 1.0,
    reach: Annotated[
        float,
        typer.Option(
            help="1: weigh a later token by the drafter's probability of the tokens before it; 0: do not."
        ),
    ] = 0.0,
    loss: Annotated[
        str,
        typer.Option(
            help="What a guess is worth: kl, tv (0.1 cross-entropy, 0.9 total variation), lk (of both), gumbel (T > 0)."
        ),
    ] = "kl",
    depth_weights: Annotated[
        str,
        typer.Option(
            help="What a depth weighs: decay (fixed), or dpace (what it adds to the accepted length)."
        ),
    ] = "decay",
    exit_dim: Annotated[
        int | None, typer.Option(help="Width of the drafter. Default: chosen from the target's hidden size.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of residual blocks. Default: 2.")] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            help="Limit the drafter to this many of the most common tokens (0: all). Default: 6144, or as --start-from."
        ),
    ] = None,
    context_layers: Annotated[
        str,
        typer.Option(
            help="Target layers whose output the drafter reads: auto, none, or numbers like 6,14,22."
        ),
    ] = "auto",
    start_from: Annotated[
        Path | None, typer.Option(help="Continue from this drafter instead of starting a new one.")
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Stop after this many validations without improvement (0: never).")
    ] = 0,
    validate_every: Annotated[int, typer.Option(help="Training steps between validations.")] = 200,
    quantize: Annotated[
        int, typer.Option(help="Also export a copy quantized to 4 or 8 bits (0: float16 only).")
    ] = 0,
    push_to_hub: Annotated[
        str, typer.Option(help="Upload the drafter to this Hugging Face repository.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Random seed of data and training.")] = 0,
) -> None:
    """Train a recurrent drafter on text that the target generates.

    A run that was stopped continues where it was when it is started again with the same options.
    """
    from redrafter_mlx.train.card import model_argument
    from redrafter_mlx.train.lock import locked_folder
    from redrafter_mlx.train.loss import Objective
    from redrafter_mlx.train.request import Inputs, Request, Shape
    from redrafter_mlx.train.settings import Settings

    window = Settings().window
    if batch < 1 or batch % window:
        raise ValueError(f"--batch must be a multiple of {window}, not {batch}")
    if quantize not in (0, 4, 8):
        raise ValueError(f"--quantize must be 4 or 8 bits, or 0 for none, not {quantize}")
    if start_from is not None and (exit_dim is not None or layers is not None):
        raise ValueError("--start-from keeps that drafter's shape, so it takes no --exit-dim and no --layers")
    if draft_vocab is not None and draft_vocab < 0:
        raise ValueError(f"--draft-vocab must be 0 (all) or more, not {draft_vocab}")
    given = text or from_history
    if given is not None and max_tokens is not None:
        raise ValueError(f"--max-tokens is for answers to be written, and {given} has them")
    if push_to_hub:
        _check_hub(push_to_hub)
    shape = Shape(exit_dim)
    if layers is not None:
        shape = replace(shape, num_draft_layers=layers)
    if draft_vocab is not None:
        shape = replace(shape, draft_vocab_size=draft_vocab or None)
    request = Request(
        out=out,
        model=model_argument(model),
        prompts=prompts,
        text=text,
        from_history=from_history,
        num_answers=1000 if self_prompt is None and minutes is None and given is None else self_prompt,
        minutes=minutes,
        exclude=exclude,
        context_layers=_context_layers(context_layers),
        rows=rows,
        max_tokens=160 if max_tokens is None else max_tokens,
        data_seed=seed,
        disk_budget=None if disk_budget is None else disk_budget * 1e9,
        start_from=start_from,
        vocabulary=draft_vocab,
        bits=quantize or None,
        shape=shape,
        settings=Settings(
            epochs=epochs,
            learning_rate=learning_rate,
            windows=batch // window,
            objective=Objective.parse(length, soft, reach, loss, depth_weights),
            seed=seed,
            patience=patience,
            validate_every=validate_every,
        ),
    )
    inputs = Inputs.read(request)
    with locked_folder(out):
        loaded = opt.load_model(model, "none", lookup=False)
        if loaded.tokenizer is None:
            raise ValueError(f"--model {model} has no tokenizer, so it cannot write text")
        run_training(loaded, request, inputs, Wishes(allow_small, push_to_hub))


def _check_hub(name: str) -> None:
    """Check what uploading needs before hours of work.

    Raises:
        ValueError: not a name on Hugging Face, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub must be owner/name: {error}") from None
    if not get_token():
        raise ValueError(f"--push-to-hub {name} needs a login: run `hf auth login`, or set HF_TOKEN")


def _context_layers(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--context-layers must be auto, none or numbers like 6,14,22, not {text!r}"
        ) from None
