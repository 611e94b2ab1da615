"""`redrafter train`: self-distil a drafter for any target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .console import stderr

if TYPE_CHECKING:
    from redrafter_mlx.train.run import Request
    from redrafter_mlx.train.trainer import Progress, Trainer


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
    self_prompt: Annotated[
        int,
        typer.Option(help="Number of answers to generate; without --prompts, to the target's own questions."),
    ] = 1000,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Prompts never to train on, such as a benchmark's (.jsonl, .txt)."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 160,
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
    from redrafter_mlx.train.loss import Objective
    from redrafter_mlx.train.run import Request, Shape
    from redrafter_mlx.train.trainer import Settings

    if length < 2:
        raise ValueError(f"--length counts the root and must be at least 2, not {length}")
    window = Settings().window
    if batch < 1 or batch % window:
        raise ValueError(f"--batch must be a multiple of {window}, not {batch}")
    if start_from is not None and (exit_dim is not None or layers is not None):
        raise ValueError("--start-from keeps that drafter's shape, so it takes no --exit-dim and no --layers")
    shape = Shape(exit_dim)
    if layers is not None:
        shape = replace(shape, num_draft_layers=layers)
    if draft_vocab is not None:
        shape = replace(shape, draft_vocab_size=draft_vocab or None)
    request = Request(
        out=out,
        prompts=prompts,
        text=text,
        num_answers=self_prompt,
        exclude=exclude,
        context_layers=_context_layers(context_layers),
        rows=rows,
        max_tokens=max_tokens,
        data_seed=seed,
        disk_budget=None if disk_budget is None else disk_budget * 1e9,
        start_from=start_from,
        vocabulary=draft_vocab,
        shape=shape,
        settings=Settings(
            epochs=epochs,
            learning_rate=learning_rate,
            windows=batch // window,
            objective=Objective(depths=length - 1, soft=soft, reach=reach),
            seed=seed,
            patience=patience,
            validate_every=validate_every,
        ),
    )
    loaded = opt.load_model(model, "none")
    if loaded.tokenizer is None:
        raise ValueError(f"--model {model} has no tokenizer, so it cannot write text")
    trainer = _run(loaded.target, loaded.tokenizer, request)
    _finish(trainer, request, quantize, push_to_hub)


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


def _run(target: Any, tokenizer: Any, request: Request) -> Trainer:
    """Generate the text and train, with progress bars on stderr."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from redrafter_mlx.train.run import make_trainer, write_data

    console = stderr()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Bars(*columns, console=console) as bars:
        expected = request.num_answers * request.max_tokens
        writing = bars.add_task("writing", total=expected, note="")

        def on_step(count: int) -> None:
            bars.advance(writing, count)
            speed = bars.tasks[writing].speed or 0.0
            bars.update(writing, note=f"at most {expected} tokens, {speed:.0f}/s")

        tokens = write_data(target, tokenizer, request, on_step)
        bars.update(writing, total=tokens, completed=tokens, note=f"{tokens} tokens")
        trainer = make_trainer(target, request)
        console.print(trainer.estimate())
        training = bars.add_task("training", total=trainer.steps, note="")

        def on_progress(progress: Progress) -> None:
            depths = " ".join(f"{share:.2f}" for share in progress.acceptance)
            note = (
                f"loss {progress.loss:.3f}, held-out {progress.tokens_per_step:.2f} tokens/step "
                f"(by depth {depths}), {progress.positions_per_second:.0f} positions/s"
            )
            bars.update(training, completed=progress.step, note=note)

        trainer.run(on_progress)
    return trainer


def _finish(trainer: Trainer, request: Request, quantize: int, push_to_hub: str) -> None:
    from redrafter_mlx.train.data import Text
    from redrafter_mlx.train.plot import plot
    from redrafter_mlx.train.run import export

    out = request.out
    try:
        plot(out / "metrics.jsonl", out / "metrics.png")
    except ValueError as error:
        typer.echo(f"no plot: {error}", err=True)
    if request.text is None and request.prompts is None:
        Text.of(out / "data").save(out / "text.npz")
    for bits in (None, quantize) if quantize else (None,):
        folder = out / (f"{bits}bit" if bits else "float16")
        done = export(out, folder, trainer.target, trainer.corpus, bits)
        typer.echo(
            f"{folder}: {done.bytes / 1e6:.1f} MB, {done.after:.3f} tokens per step "
            f"on held-out text (before: {done.before:.3f})"
        )
    if push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=out / "float16")
        typer.echo(f"uploaded to https://huggingface.co/{push_to_hub}")
