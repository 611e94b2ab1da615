"""Shards as batches, and what of them the drafter's weights start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from redrafter_mlx.target import Target
from redrafter_mlx.train.corpus import Corpus, WindowShape
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.prompts import is_held_out
from redrafter_mlx.train.request import Inputs, Request
from redrafter_mlx.train.rows import Answer
from redrafter_mlx.train.scaling import Scaling
from redrafter_mlx.train.shards import save_shard, shard_path
from redrafter_mlx.train.trainer import Trainer

from .toy import HIDDEN, VOCAB, make_drafter, make_target
from .training import (
    LAYERS,
    SETTINGS,
    a_batch,
    config,
    write_corpus,
)

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


def test_an_epoch_covers_the_training_text_once(data: Path) -> None:
    corpus = Corpus([data])
    held = sum(is_held_out(f"prompt {i}", 20) for i in range(60))
    assert 0 < held < 10
    assert corpus.num_positions == (60 - held) * 24
    shape = WindowShape(2, 8, 3)
    seen = [batch for batch in corpus.epoch(1, 0, shape)]
    assert len(seen) == corpus.num_batches(shape)
    again = [batch for batch in corpus.epoch(1, 0, shape, skip=2)]
    assert mx.array_equal(seen[2].contexts, again[0].contexts)
    assert not mx.array_equal(seen[0].tokens, next(corpus.epoch(2, 0, shape)).tokens)


def test_windows_know_where_texts_end(target: Target, data: Path) -> None:
    """Where `left` lets a depth count, the token there follows in the same text."""
    rows = target.output_rows()
    for batch in Corpus([data], limit=100).epoch(0, 3, WindowShape(2, 8, 3)):
        chosen = np.array(mx.argmax(batch.contexts[..., :HIDDEN] @ rows.T, axis=-1))
        tokens, left = np.array(batch.tokens), np.array(batch.left)
        for window in range(2):
            for position in range(8):
                for ahead in range(min(3, left[window, position]) + 1):
                    at = position + ahead
                    assert chosen[window, at] == tokens[window, at]  # greedy: context chose token


def test_the_draft_vocabulary_is_the_commonest_tokens(target: Target, data: Path) -> None:
    corpus = Corpus([data])
    counts = corpus.token_counts(VOCAB)
    ids = new_drafter(config(draft_vocab_size=10), target, corpus).target_ids()
    assert ids is not None
    order = np.array(ids)
    assert (np.diff(counts[order]) <= 0).all()
    assert counts[order].sum() == np.sort(counts)[-10:].sum()


def test_corpus_errors(tmp_path: Path, target: Target) -> None:
    with pytest.raises(ValueError, match="no complete shard"):
        Corpus([tmp_path])
    write_corpus(tmp_path, target, 4)
    save_shard(shard_path(tmp_path, 7), ["p"], [0.0], [Answer([1, 2], [np.zeros(5)] * 2)])
    with pytest.raises(ValueError, match=r"one size, but have \[5, 96\]"):
        Corpus([tmp_path])


def test_scaling_folds_away_exactly(target: Target, data: Path) -> None:
    corpus = Corpus([data])
    scaling = Scaling.of(corpus, target)
    drafter = new_drafter(config(), target, corpus)
    weights = scaling.unfold(drafter.trainable_parameters())
    folded = dict(tree_flatten(scaling.fold(weights)))
    for name, theirs in dict(tree_flatten(drafter.trainable_parameters())).items():
        np.testing.assert_allclose(np.array(folded[name]), np.array(theirs), atol=1e-5, err_msg=name)
    # the optimizer's weights act on standardized inputs
    batch = a_batch(data)
    context = batch.contexts[:, 0]
    inner = weights["input_proj"]
    standard = (context - scaling.mean) / scaling.deviation
    size = drafter.config.context_size
    got = standard @ inner["weight"][:, :size].T + inner["bias"]
    want = context @ drafter.input_proj.weight[:, :size].T + drafter.input_proj.bias
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-3)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    target: Target, tmp_path: Path
) -> None:
    corpus = Corpus([write_corpus(tmp_path / "data", target, 6, 4)])
    assert corpus.num_positions < 32
    with pytest.raises(
        ValueError,
        match=rf"{corpus.num_positions} tokens in 2 shards .* takes 32 in windows of 8 .* at least 64",
    ):
        Trainer(new_drafter(config(), target, corpus, 0), target, corpus, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="3 answers have at most 24 tokens, and one batch takes 32"):
        Inputs.read(Request(tmp_path / "out", num_answers=3, max_tokens=8, settings=SETTINGS))


def test_a_random_drafter_of_another_target_does_not_fit(target: Target, data: Path) -> None:
    other = make_drafter(make_target("qwen2"))
    assert other.config.context_size != Corpus([data]).context_size
