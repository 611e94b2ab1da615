"""The objective and the trainer, on a tiny random target."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redrafter_mlx.drafters.kinds import load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.stats import Stats
from redrafter_mlx.target import Target
from redrafter_mlx.train.calibrate import calibrate
from redrafter_mlx.train.checkpoint import METRICS
from redrafter_mlx.train.corpus import Corpus, WindowShape
from redrafter_mlx.train.export import export
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.loss import Batch, Objective
from redrafter_mlx.train.prompts import is_held_out
from redrafter_mlx.train.replay import replay
from redrafter_mlx.train.request import Inputs, Request, Shape, default_exit_dim
from redrafter_mlx.train.rows import Answer
from redrafter_mlx.train.run import check_target, make_trainer
from redrafter_mlx.train.scaling import Scaling
from redrafter_mlx.train.settings import Settings
from redrafter_mlx.train.shards import list_shards, save_shard, shard_path
from redrafter_mlx.train.trainer import Trainer
from redrafter_mlx.tree import Beam

from .toy import HIDDEN, VOCAB, make_drafter, make_target

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

LAYERS = (0, 2)
SETTINGS = Settings(
    epochs=2,
    windows=4,
    window=8,
    validate_every=5,
    objective=Objective(depths=3),
    learning_rate=3e-3,
)


def write_corpus(folder: Path, target: Target, answers: int = 60, length: int = 24) -> Path:
    """Greedy continuations of random prompts, without the generator: the corpus is then known
    exactly."""
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(3, VOCAB, (answers, 4)))
    for _ in range(length):
        following = mx.argmax(target.model(tokens)[:, -1], axis=-1)[:, None]
        tokens = mx.concatenate([tokens, following], axis=1)
    contexts = np.array(target.contexts(tokens).astype(mx.float32))
    written = [
        Answer(row[4:].tolist(), list(context[3:-1]))
        for row, context in zip(np.array(tokens), contexts, strict=True)
    ]
    for index in range(2):
        half = slice(index, None, 2)
        prompts = [f"prompt {i}" for i in range(answers)][half]
        save_shard(shard_path(folder, index), prompts, [0.0] * len(prompts), written[half])
    return folder


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


def config(**changes: Any) -> DrafterConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "exit_dim": 64, "num_draft_layers": 1,
        "head": "factored",
        "draft_vocab_size": 40, "context_layers": LAYERS, **changes,
    }  # fmt: skip
    return DrafterConfig(**values)


def attached(target: Target, **changes: Any) -> RecurrentDrafter:
    """A new drafter that is still being trained."""
    drafter = RecurrentDrafter(config(**changes))
    drafter.attach(target)
    return drafter


def trainer(target: Target, data: Path, out: Path, **changes: Any) -> Trainer:
    corpus = Corpus([data])
    settings = replace(SETTINGS, **changes)
    return Trainer(new_drafter(config(), target, corpus, 0), target, corpus, out, settings)


def a_batch(data: Path, depths: int = 3) -> Batch:
    return next(Corpus([data]).epoch(0, 0, WindowShape(3, 8, depths)))


# --- corpus ------------------------------------------------------------------------------------


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


# --- trainer -----------------------------------------------------------------------------------


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
def test_a_run_can_go_on_from_a_drafter(target: Target, data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(target, data, first, epochs=20).run()
    second.mkdir()
    (second / "data").symlink_to(data)
    request = Request(second, start_from=first, settings=replace(SETTINGS, epochs=1, learning_rate=1e-5))

    def started(request: Request) -> Trainer:
        inputs = Inputs.read(request)
        check_target(target, request, inputs)
        return make_trainer(target, request, inputs, list_shards(data))

    made = started(request)
    made.run()
    third = tmp_path / "third"
    records = [json.loads(line) for line in (second / METRICS).read_text().splitlines()]
    last = json.loads((first / METRICS).read_text().splitlines()[-1])
    assert abs(records[0]["tokens_per_step"] - last["tokens_per_step"]) < 0.2
    wider = started(replace(request, vocabulary=60, out=third))
    assert wider.drafter.config.draft_vocab == 60 and wider.coverage > made.coverage
    assert f"covers {wider.coverage:.1%} of the text" in wider.summary()
    everything = started(replace(request, vocabulary=0, out=third))
    assert everything.drafter.config.draft_vocab == VOCAB and everything.coverage == 1
    with pytest.raises(ValueError, match="has a full head, made for the vocabulary it has"):
        started(replace(request, vocabulary=40, out=third, start_from=full_headed(target, tmp_path)))
    earlier = load_recurrent(second).config.training["earlier"]
    assert [run["epochs"] for run in earlier] == [20]
    assert "| before that, run 1 |" in (second / "README.md").read_text()
    with pytest.raises(ValueError, match="start_from '[0-9a-f]+' there, None now.*delete .*last.safetensors"):
        Inputs.read(replace(request, start_from=None))
    with pytest.raises(ValueError, match="does not fit the target"):
        started(replace(request, out=third, start_from=other_drafter(tmp_path)))
    with pytest.raises(ValueError, match=r"reads the target's layers \[0, 2\], not \[1\]"):
        started(replace(request, out=third, context_layers=(1,)))


def full_headed(target: Target, folder: Path) -> Path:
    drafter = attached(target, head="full", draft_vocab_size=40)
    save_drafter(drafter, folder / "full")
    return folder / "full"


def other_drafter(folder: Path) -> Path:
    config_ = config(vocab_size=VOCAB + 1, draft_vocab_size=None, head="full", context_layers=())
    save_drafter(RecurrentDrafter(config_), folder / "other")
    return folder / "other"


def final_weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "last.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = final_weights(one), final_weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        # Not bit for bit: MKL rounds by memory alignment, which two runs do not share.
        # A lost moment, step or batch moves weights by about the learning rate, 3e-3.
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, rtol=1e-4, err_msg=name)


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


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(target: Target, data: Path, tmp_path: Path) -> None:
    trainer(target, data, tmp_path / "whole").run()
    for steps in (7, 13, 1000):  # 7 and 13 lie between checkpoints: what came after them is redone
        trainer(target, data, tmp_path / "cut").run(stop_after=steps)
    assert_same(tmp_path / "whole", tmp_path / "cut")


KILLED = """
import sys
from pathlib import Path
from tests.test_train import LAYERS, trainer
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
    assert_same(tmp_path / "whole", tmp_path / "cut")


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


def test_early_stopping(target: Target, data: Path, tmp_path: Path) -> None:
    made = trainer(target, data, tmp_path, epochs=50, learning_rate=1e-9, patience=2)
    made.run()
    assert made.step == 10  # nothing improves on step 0: two validations of 5 steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(depths=0), "depths must be at least 1, not 0"),
        (lambda: Objective(soft=2.0), "soft must be between 0 and 1, not 2.0"),
        (lambda: Objective(decay=0.0), r"decay must be in \(0, 1\], not 0.0"),
        (lambda: Settings(epochs=0), "epochs must be positive and finite, not 0"),
        (lambda: Settings(epochs=math.inf), "epochs must be positive and finite, not inf"),
        (lambda: Settings(learning_rate=math.nan), "learning_rate must be positive and finite, not nan"),
        (lambda: Settings(patience=-1), "patience must be 0 or more, not -1"),
        (lambda: Settings(seed=-1), "seed must be 0 or more, not -1"),
        (lambda: Shape(exit_dim=0), "exit_dim must be at least 1, not 0"),
        (lambda: Shape(num_draft_layers=-1), "residual blocks must be 0 or more, not -1"),
        (
            lambda: Request(Path("o"), disk_budget=math.inf),
            "disk budget must be positive and finite, not inf",
        ),
        (lambda: Request(Path("o"), bits=3), "bits must be 4 or 8, not 3"),
        (lambda: Request(Path("o"), vocabulary=-1), "--draft-vocab must be 0 .all. or more, not -1"),
        (lambda: Request(Path("o"), context_layers=(1, 1)), r"different and 0 or more, not \[1, 1\]"),
        (lambda: Request(Path("o"), max_tokens=0), "max_tokens must be at least 1, not 0"),
        (lambda: Request(Path("o"), minutes=5), "answers .* or a time .*, not both"),
        (lambda: Settings(warmup=1.0), r"warmup must be in \[0, 1\), not 1.0"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_size_of_a_run_is_stated(target: Target, data: Path, tmp_path: Path) -> None:
    text = trainer(target, data, tmp_path).summary()
    assert f"{Corpus([data]).num_positions:,} positions" in text and "GB" in text


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "billions"),
    [(4096, 32000, 6.74), (4096, 128256, 8.03), (3584, 152064, 7.62)],
    ids=["vicuna-7b", "llama-3.1-8b", "qwen2.5-7b"],
)
def test_a_drafter_reads_under_a_tenth_of_a_7b_target(
    hidden_size: int, vocab_size: int, billions: float
) -> None:
    made = config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        exit_dim=default_exit_dim(hidden_size),
        num_draft_layers=Shape().num_draft_layers,
        draft_vocab_size=Shape().draft_vocab_size,
        context_layers=(6, 14, 22),
    )
    own = sum(a.size for _, a in tree_flatten(RecurrentDrafter(made).trainable_parameters()) if a.ndim == 2)
    once = made.exit_dim * made.context_size  # what the context is multiplied by, ahead of all levels
    level = own - once + made.draft_vocab * hidden_size  # the target's rows are read too
    assert once + 4 * level < 0.1 * billions * 1e9


def test_a_random_drafter_of_another_target_does_not_fit(target: Target, data: Path) -> None:
    other = make_drafter(make_target("qwen2"))
    assert other.config.context_size != Corpus([data]).context_size
