"""A drafter that has learned, as it is to be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.stats import Stats
from redrafter_mlx.target import Target
from redrafter_mlx.train.calibrate import calibrate
from redrafter_mlx.train.checkpoint import METRICS
from redrafter_mlx.train.export import export
from redrafter_mlx.train.replay import replay
from redrafter_mlx.tree import Beam

from .toy import make_target
from .training import (
    LAYERS,
    trainer,
    write_corpus,
)

# isort: split
import mlx.core as mx


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


@pytest.mark.slow
def test_training_learns(target: Target, data: Path, tmp_path: Path) -> None:
    made = trainer(target, data, tmp_path, epochs=30, validate_every=100)

    def on_training_text() -> float:
        shard = made.corpus.shards[0]
        spans = np.split(shard.training, np.flatnonzero(shard.left[shard.training] == 0) + 1)
        found = Stats()
        for span in spans[:-1]:
            for accepted in replay(
                made.drafter, target.embed, shard.contexts[span], shard.tokens[span].tolist(), Beam(1, 4)
            ):
                found.observe(1, accepted + 1)
        return found.tokens_per_step

    before = on_training_text()
    best = made.run()
    assert on_training_text() > before + 0.15
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert records[-1]["loss"] < records[1]["loss"] - 0.3  # the rest is the target's own entropy
    assert best == max(record["tokens_per_step"] for record in records)
    loaded = load_recurrent(tmp_path)
    assert loaded.config.context_layers == LAYERS
    assert f"{best:.3f} tokens per step" in (tmp_path / "README.md").read_text()
    done = export(tmp_path, tmp_path / "half", target, made.corpus, None)
    assert done.before == pytest.approx(best) and abs(done.after - done.before) < 0.05
    assert load_recurrent(tmp_path / "half").rnn_w.weight.dtype == mx.float16
    packed = export(tmp_path, tmp_path / "packed", target, made.corpus, 8)
    assert packed.bytes < done.bytes and abs(packed.after - packed.before) < 0.2
    with pytest.raises(ValueError, match="bits must be 4 or 8, not 3"):
        export(tmp_path, tmp_path / "odd", target, made.corpus, 3)


@pytest.mark.slow
def test_calibration_undoes_a_scaling_of_the_logits(target: Target, data: Path, tmp_path: Path) -> None:
    made = trainer(target, data, tmp_path)
    made.run()

    def fitted() -> tuple[float, ...]:
        batches = made.corpus.held_out(made.settings.shape, 4000)
        return calibrate(made.drafter, target, made.rows, batches, made.settings.objective.depths)

    head = made.drafter.lm_head[-1]
    head.weight = head.weight * 0.2
    before = fitted()
    head.weight = head.weight * 1.5
    after = fitted()
    inside = [d for d in range(3) if 0.5 < before[d] and after[d] < 2.5]
    assert inside, "all at the grid's ends would prove nothing"
    for depth in inside:
        assert after[depth] / before[depth] == pytest.approx(1.5, rel=0.08)
