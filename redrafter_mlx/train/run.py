"""From a target to a trainer: write the text of a run, and start or continue its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.drafters.recurrent import changed
from redrafter_mlx.target import Target

from .corpus import Corpus
from .data import Generator, Watch
from .export import group_size
from .initial import choose_vocabulary, new_drafter
from .prompts import MAX_PROMPT_TOKENS, check_prompts
from .request import Inputs, Request, default_context_layers, default_exit_dim
from .trainer import Trainer

DATA = "data"


def check_target(target: Target, request: Request, inputs: Inputs) -> None:
    """Check what depends on the target alone, and set the layers it is to note, before any text is written.

    Raises:
        ValueError: context layers that the target does not have, text that it cannot have written, a drafter of
            another target, sizes that cannot be quantized; or a target that no drafter can serve.
    """
    start = inputs.start
    layers = request.context_layers
    if layers is None:
        layers = start.config.context_layers if start else default_context_layers(len(target.model.layers))
    target.watch(layers)
    if inputs.text is not None and request.text is not None:
        inputs.text.check_vocabulary(target.vocab_size, request.text)
    if start is not None:
        if start.config.context_layers != layers:
            raise ValueError(
                f"--start-from {request.start_from} reads the target's layers {list(start.config.context_layers)}, not "
                f"{list(layers)}: leave --context-layers out"
            )
        start.attach(target)
    room = None if target.max_length is None else target.max_length - MAX_PROMPT_TOKENS
    if inputs.text is None and room is not None and request.max_tokens > room:
        raise ValueError(
            f"--max-tokens must leave room for a question of {MAX_PROMPT_TOKENS} tokens in the {target.max_length} "
            f"tokens that {target.name} is made for, and {request.max_tokens} do not"
        )
    target.check_tree()
    if not target.drafts.chains:
        raise ValueError(
            f"{target.name} cannot be drafted for, so a drafter is of no use: {target.drafts.reason}"
        )
    width = start.config.exit_dim if start else request.shape.exit_dim or default_exit_dim(target.hidden_size)
    if request.bits is not None:
        group_size(target.hidden_size, width)


def write_data(
    target: Target, tokenizer: Any, request: Request, inputs: Inputs, watch: Watch | None = None
) -> list[Path]:
    """Generate the text of a run, or what is missing of it. Returns its shards.

    Raises:
        ValueError: see `Generator`.
    """
    asked = inputs.prompts[: request.num_answers]
    if inputs.text is not None and inputs.text.asked is None:
        asked = [[{"role": "user", "content": prompt}] for prompt in inputs.text.prompts]
    check_prompts(tokenizer, asked)
    recipe = request.recipe(target.name, target.context_layers, inputs.fingerprint())
    generator = Generator(target, tokenizer, request.out / DATA, recipe, inputs.excluded, request.disk_budget)
    if inputs.text is not None:
        return generator.run_text(inputs.text, watch)
    return generator.run(request.num_answers, inputs.prompts, watch)


def make_trainer(target: Target, request: Request, inputs: Inputs, shards: Sequence[Path]) -> Trainer:
    """The trainer of a run whose text is complete.

    Raises:
        ValueError: see `Corpus` and `Trainer`.
    """
    if not shards:
        raise ValueError(f"no text was written: {_why_no_text(target, request, inputs)}")
    corpus = Corpus(shards)
    corpus.check_enough(request.settings.shape)
    drafter = inputs.start
    if drafter is None:
        drafter = new_drafter(request.shape.config(target), target, corpus, request.settings.seed)
    else:
        if request.vocabulary is not None:
            choose_vocabulary(drafter, corpus, request.vocabulary or drafter.config.vocab_size)
        drafter.train()
        drafter.attach(target)
        drafter.freeze(keys=["d2t"], recurse=False)
        drafter.config = changed(drafter.config, calibration=())  # that of the old weights
    mx.eval(drafter.parameters())
    return Trainer(drafter, target, corpus, request.out, request.settings, inputs.origin)


def _why_no_text(target: Target, request: Request, inputs: Inputs) -> str:
    if mx.distributed.init().size() > 1:
        return "write it with one process first; several only train"
    if request.minutes is not None:
        return f"{request.minutes} minutes leave no time for it"
    if inputs.fingerprint() == "self":
        return f"none of {target.name}'s own questions could be used. Give questions: --prompts FILE"
    return "every prompt is excluded, empty or too long"
