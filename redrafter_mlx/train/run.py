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
    target.check_tree()
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
        raise ValueError(
            f"no text was written: none of {target.name}'s own questions could be used. Give questions: --prompts FILE"
            if inputs.fingerprint() == "self"
            else "no text was written: every prompt is excluded or empty"
        )
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
