"""A training run as its user sees it: what it will take, how far it is, what came out and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .train_view import View, WritingView, duration, show_training

if TYPE_CHECKING:
    from redrafter_mlx import Model
    from redrafter_mlx.train.plan import Plan
    from redrafter_mlx.train.request import Inputs, Request
    from redrafter_mlx.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked of a run besides its request."""

    allow_small: bool
    """Go on though the run is too small to pay."""
    push_to_hub: str
    """Repository to upload to; empty: none."""


def run_training(model: Model, request: Request, inputs: Inputs, wishes: Wishes) -> None:
    """Write the text, train, export, compare, and say at each point what a person wants to know.

    Raises:
        ValueError, OSError: what cannot be, or a run that is too small to pay.
    """
    from redrafter_mlx.train.run import check_target, make_trainer

    inputs = inputs.with_history(request, model.target, model.tokenizer)
    check_target(model.target, request, inputs)
    with View() as view:
        try:
            plan = _announce(view, model, request, inputs, wishes)
            shards = _write(view, model, request, inputs, plan)
            trainer = make_trainer(model.target, request, inputs, shards)
            view.say(trainer.summary())
            trainer.run(lambda progress: show_training(view, progress))
        except KeyboardInterrupt:
            view.say(_kept(request.out))
            raise
        if not trainer.group.rank():
            _finish(view, model, trainer, request, wishes)


def _announce(view: View, model: Model, request: Request, inputs: Inputs, wishes: Wishes) -> Plan | None:
    """Say what the run will take and bring; None for one that has begun to train, which was told before."""
    from redrafter_mlx.train.plan import Plan, has_checkpoint

    if has_checkpoint(request.out):
        view.say(f"{request.out} holds a training that has begun: going on")
        return None
    view.say(f"measuring how fast {model.target.name} writes and a drafter trains here ...")
    plan = Plan.measure(model.target, request, inputs)
    estimate = plan.estimate()
    there = f" ({plan.saved[1]:,} are there)" if plan.saved[1] else ""
    view.say(
        f"Here, now: writing about {estimate.positions:,.0f} tokens{there} takes {duration(estimate.writing)}, "
        f"training {duration(estimate.training)}, exporting and comparing {duration(estimate.finishing)}: "
        f"{duration(estimate.seconds)} in all."
    )
    if inputs.start is None:
        view.say(
            f"Expect about {estimate.tokens_per_step:.2f} tokens per step with one beam of 5, by the curve measured "
            "with SmolLM2-135M (docs/training.md); other models differ."
        )
    warning = plan.warning(wishes.allow_small)
    if warning is not None:
        view.say(f"warning: {warning}")
    view.say("Ctrl-C keeps what is written, and the same command goes on from there.")
    return plan


def _write(view: View, model: Model, request: Request, inputs: Inputs, plan: Plan | None) -> list[Path]:
    """Write the text. A run that has begun to train takes the text that is there, and so do several processes."""
    import mlx.core as mx

    from redrafter_mlx.train.data import Watch
    from redrafter_mlx.train.plan import Deadline
    from redrafter_mlx.train.run import write_data

    def run(watch: Watch) -> list[Path]:
        return write_data(model.target, model.tokenizer, request, inputs, watch)

    if mx.distributed.init().size() > 1:
        return run(Watch(is_over=lambda _: True))  # written together, shards would be written twice
    if request.minutes is None:
        return run(Watch(WritingView(view).on_step))
    if plan is None:
        return run(Watch(is_over=lambda _: True))
    deadline = Deadline(plan)
    shown = WritingView(view, deadline.left)
    with deadline.running():
        return run(Watch(shown.on_step, deadline.is_over))


def _kept(out: Path) -> str:
    """What an interrupted run leaves behind, in words."""
    from redrafter_mlx.train.plan import has_checkpoint, saved_text
    from redrafter_mlx.train.run import DATA

    answers, tokens = saved_text(out / DATA)
    begun = (
        ", and of the answers or questions begun what was written"
        if any((out / DATA).glob("begun-*"))
        else ""
    )
    trained = ", and the training up to its last checkpoint" if has_checkpoint(out) else ""
    return (
        f"kept in {out}: {answers:,} answers of {tokens:,} tokens{begun}{trained}. The same command goes on"
    )


def _finish(view: View, model: Model, trainer: Trainer, request: Request, wishes: Wishes) -> None:
    """Export the drafter, keep the text that was written, compare, and upload if asked to."""
    from redrafter_mlx.train.export import export
    from redrafter_mlx.train.plot import plot
    from redrafter_mlx.train.shards import SavedAnswers

    out = request.out
    shards = [shard.path for shard in trainer.corpus.shards]
    try:
        plot(out / "metrics.jsonl", out / "metrics.png")
    except ValueError as error:
        view.say(f"no plot: {error}")
    if not request.has_text and request.prompts is None:
        SavedAnswers.of(shards).save(out / "text.npz")
    copies = [None, request.bits] if request.bits else [None]
    for number, bits in enumerate(copies):
        folder = out / (f"{bits}bit" if bits else "float16")
        view.show("exporting", number / len(copies), f"{folder}: rounding, calibrating on held-out text")
        done = export(out, folder, trainer.target, trainer.corpus, bits, request.model)
        view.show("exporting", (number + 1) / len(copies), f"{folder}")
        figures = f"{done.after:.3f} tokens per step on held-out text (before: {done.before:.3f})"
        measured = figures if done.before else "not measured, as none of the answers is held out"
        typer.echo(f"{folder}: {done.bytes / 1e6:.1f} MB, {measured}")
    if wishes.push_to_hub:
        _upload(out / "float16", request.model, wishes.push_to_hub)
    _conclude(view, model, out / "float16", shards, request)


def _conclude(view: View, model: Model, drafter: Path, shards: Sequence[Path], request: Request) -> None:
    """Say what the drafter brings on this machine, and how to use it or what to do instead."""
    from redrafter_mlx.train.card import command
    from redrafter_mlx.train.verdict import held_out_questions, judge

    questions = held_out_questions(shards)
    view.show("comparing", 0.0, f"{len(questions)} questions with and without the drafter")
    found = judge(model, drafter, questions)
    view.show("comparing", 1.0, f"{found.questions} questions with and without the drafter")
    same = (
        "the same tokens"
        if found.is_same
        else "other tokens (weights of 16 bits round differently in a batch)"
    )
    typer.echo(
        f"On this machine: {found.speed_up:.2f}x plain decoding ({found.drafted:.1f} against {found.plain:.1f} "
        f"tokens/s; {found.tokens_per_step:.2f} tokens per step; {found.questions} questions, T = 0, {same})."
    )
    if found.speed_up < 1.02:
        typer.echo(
            "It does not pay here yet. Each doubling of the text brings about 0.1 tokens per step: delete "
            f"{request.out / 'last.safetensors'} and give a larger --self-prompt or --minutes; the text is kept."
        )
    typer.echo(f"Use it: {command(request.model, str(drafter.resolve()))}")


def _upload(folder: Path, model: str, name: str) -> None:
    """Upload a drafter with a card that names its place there."""
    import tempfile

    from huggingface_hub import HfApi

    from redrafter_mlx.drafters.kinds import load_recurrent
    from redrafter_mlx.train.card import hub_card, index_line

    api = HfApi()
    api.create_repo(name, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        for file in folder.iterdir():
            (Path(staged) / file.name).symlink_to(file.resolve())
        readme = Path(staged) / "README.md"
        readme.unlink(missing_ok=True)
        readme.write_text(hub_card(load_recurrent(folder).config, model, name))
        done = api.upload_folder(repo_id=name, folder_path=Path(staged))
    typer.echo(f"uploaded to https://huggingface.co/{name}")
    typer.echo(
        "To have it found by the name of its target, propose this line for "
        f"redrafter_mlx/assets/drafters/index.json: {index_line(model, name, done.oid)}"
    )
