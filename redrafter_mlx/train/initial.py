"""The drafter that a training run starts with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter, changed
from redrafter_mlx.target import Target

from .corpus import Corpus
from .scaling import Scaling, init_weights


def new_drafter(config: DrafterConfig, target: Target, corpus: Corpus, seed: int = 0) -> RecurrentDrafter:
    """A drafter before training, attached to its target. A reduced vocabulary has the corpus' most common tokens."""
    mx.random.seed(seed)
    drafter = RecurrentDrafter(config)
    if config.draft_vocab_size is not None:
        choose_vocabulary(drafter, corpus, config.draft_vocab_size)
    init_weights(drafter, Scaling.of(corpus, target))
    mx.eval(drafter.parameters())
    drafter.attach(target)
    return drafter


def choose_vocabulary(drafter: RecurrentDrafter, corpus: Corpus, size: int) -> None:
    """Make the `size` most common tokens of the corpus the drafter's vocabulary; attach the drafter afterwards.

    The rows of a full head are not moved, so a drafter whose full head was trained must keep its vocabulary.
    """
    drafter.config = changed(drafter.config, draft_vocab_size=size)
    counts = corpus.token_counts(drafter.config.vocab_size)
    ids = np.argsort(-counts, kind="stable")[:size]
    drafter.d2t = mx.array(ids - np.arange(len(ids)), dtype=mx.int32)
    drafter.freeze(keys=["d2t"], recurse=False)
