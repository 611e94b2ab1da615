"""Training on a tiny random target: checkpoints, metrics, what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redrafter_mlx.target import Target
from redrafter_mlx.train.checkpoint import METRICS
from redrafter_mlx.train.corpus import Corpus
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.trainer import Trainer

from .toy import make_target
from .training import (
    LAYERS,
    SETTINGS,
    assert_same_weights,
    attached,
    config,
    final_weights,
    trainer,
    write_corpus,
)

# isort: split


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(target: Target, data: Path, tmp_path: Path) -> None:
    trainer(target, data, tmp_path / "whole").run()
    for steps in (7, 13, 1000):  # 7 and 13 lie between checkpoints: what came after them is redone
        trainer(target, data, tmp_path / "cut").run(stop_after=steps)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


KILLED = """
import sys
from pathlib import Path
from tests.training import LAYERS, trainer
from tests.toy import make_target
target = make_target()
target.watch(LAYERS)
trainer(target, Path(sys.argv[1]), Path(sys.argv[2])).run(lambda p: print(p.step, flush=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_a_run_that_continues(target: Target, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(data), str(tmp_path / "cut")]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 8:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    trainer(target, data, tmp_path / "cut").run()
    trainer(target, data, tmp_path / "whole").run()
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


LAUNCHER = Path(sys.executable).with_name("mlx.launch")


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCHER.is_file(), reason="mlx.launch is not beside this interpreter")
def test_two_processes_have_the_loss_curve_of_one(target: Target, data: Path, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    code = KILLED.replace("print(p.step, flush=True)", "None")
    (script := tmp_path / "run.py").write_text("import sys; sys.path.insert(0, sys.argv[3])" + code)
    command = [str(LAUNCHER), "-n", "2", "--backend", "ring", "--", sys.executable, str(script)]
    done = subprocess.run(
        [*command, str(data), str(tmp_path / "two"), str(root)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    trainer(target, data, tmp_path / "one").run()
    one, two = (
        [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) > 2 and all("loss" in record for record in one)
    for mine, theirs in zip(one[1:], two[1:], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    target: Target, data: Path, tmp_path: Path
) -> None:
    made = trainer(target, data, tmp_path)
    made.run(stop_after=5)
    before = final_weights(tmp_path)
    made = trainer(target, data, tmp_path)
    made.rows = made.rows * math.nan
    with pytest.raises(
        ValueError, match="the loss became nan at step 5: try a smaller.*delete .*last.safetens"
    ):
        made.run()
    for name, array in final_weights(tmp_path).items():
        np.testing.assert_array_equal(array, before[name])


def test_other_settings_or_data_are_refused(target: Target, data: Path, tmp_path: Path) -> None:
    trainer(target, data, tmp_path).run(stop_after=5)
    with pytest.raises(
        ValueError, match="other options or data: seed 0 there, 1 now.*delete .*last.safetensors"
    ):
        trainer(target, data, tmp_path, seed=1).run()
    corpus = Corpus([data])
    for changes in ({"exit_dim": 96}, {"num_draft_layers": 2}, {"draft_vocab_size": 41}):
        other = new_drafter(config(**changes), target, corpus, 0)
        with pytest.raises(ValueError, match=f"{list(changes)[0]} .* there"):
            Trainer(other, target, corpus, tmp_path, SETTINGS).run()
    with pytest.raises(ValueError, match=f"positions {corpus.num_positions} there, "):
        fewer = Corpus([data], limit=600)
        Trainer(new_drafter(config(), target, fewer, 0), target, fewer, tmp_path, SETTINGS).run()
    plain = attached(make_target("llama"), context_layers=())
    with pytest.raises(ValueError, match="contexts of size 96, the drafter needs 32"):
        Trainer(plain, target, Corpus([data]), tmp_path, SETTINGS)


def test_settings_may_change_until_the_first_step(target: Target, data: Path, tmp_path: Path) -> None:
    """Then nothing is lost by training anew, and the metrics are those of the new run alone."""
    trainer(target, data, tmp_path, learning_rate=1.0).run(stop_after=0)
    trainer(target, data, tmp_path).run(stop_after=5)
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 5]


def test_metrics_after_the_checkpoint_are_made_again(target: Target, data: Path, tmp_path: Path) -> None:
    """A crash between the two files, or within a line, leaves each validation in the metrics once."""
    trainer(target, data, tmp_path).run(stop_after=5)
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 10}) + '\n{"ste')
    trainer(target, data, tmp_path).run(stop_after=5)
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 5, 10] and records[-1]["loss"]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "zeros", "bare"]
)
def test_a_checkpoint_that_is_none_is_named(
    target: Target, data: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "last.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="last.safetensors is"):
        trainer(target, data, tmp_path).run()


def test_states_that_are_not_finite_are_blamed_on_the_text(
    target: Target, data: Path, tmp_path: Path
) -> None:
    made = trainer(target, data, tmp_path)
    shard = made.corpus.shards[0]
    contexts = np.array(shard.contexts)
    contexts[:] = np.inf
    made.corpus.shards[0] = replace(shard, contexts=contexts)
    with pytest.raises(
        ValueError, match="hidden states of the text hold values that are not finite; delete .*data"
    ):
        made.run()


def test_early_stopping(target: Target, data: Path, tmp_path: Path) -> None:
    made = trainer(target, data, tmp_path, epochs=50, learning_rate=1e-9, patience=2)
    made.run()
    assert made.step == 10  # nothing improves on step 0: two validations of 5 steps


def test_the_size_of_a_run_is_stated(target: Target, data: Path, tmp_path: Path) -> None:
    text = trainer(target, data, tmp_path).summary()
    assert f"{Corpus([data]).num_positions:,} positions" in text and "GB" in text
