"""What a run is asked to do, and what it goes on from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redrafter_mlx.drafters.kinds import load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.target import Target
from redrafter_mlx.train.checkpoint import METRICS
from redrafter_mlx.train.loss import Objective
from redrafter_mlx.train.request import Inputs, Request, Shape, default_exit_dim
from redrafter_mlx.train.run import check_target, make_trainer
from redrafter_mlx.train.settings import Settings
from redrafter_mlx.train.shards import SavedAnswers, list_shards
from redrafter_mlx.train.trainer import Trainer

from .toy import VOCAB, make_target
from .training import (
    LAYERS,
    SETTINGS,
    attached,
    config,
    trainer,
    write_corpus,
)

# isort: split
from mlx.utils import tree_flatten


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_target()
    made.watch(LAYERS)
    return made


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"), target)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(depths=0), "depths must be between 1 and 63, not 0"),
        (lambda: Objective(soft=2.0), "soft must be between 0 and 1, not 2.0"),
        (lambda: Objective(decay=0.0), r"decay must be in \(0, 1\], not 0.0"),
        (lambda: Settings(epochs=0), "epochs must be positive and finite, not 0"),
        (lambda: Settings(epochs=math.inf), "epochs must be positive and finite, not inf"),
        (lambda: Settings(learning_rate=math.nan), "learning_rate must be positive and finite, not nan"),
        (lambda: Settings(patience=-1), "patience must be 0 or more, not -1"),
        (lambda: Settings(seed=-1), "seed must be between 0 and 2.64 - 1, not -1"),
        (lambda: Shape(exit_dim=0), "exit_dim must be between 1 and 65536, not 0"),
        (lambda: Shape(num_draft_layers=-1), "residual blocks must be between 0 and 64, not -1"),
        (
            lambda: Request(Path("o"), disk_budget=math.inf),
            "disk budget must be positive and finite, not inf",
        ),
        (lambda: Request(Path("o"), start_from=Path("./o")), "must be different folders, not both o"),
        (lambda: Request(Path("o"), num_answers=None), "how much text to write must be given"),
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


def test_a_text_may_be_used_in_part(tmp_path: Path) -> None:
    text = SavedAnswers([f"q{i}" for i in range(4)], [0.0] * 4, [[i] * 100 for i in range(4)])
    text.save(tmp_path / "text.npz")
    for count in (None, 3, 9):
        request = Request(tmp_path / "out", text=tmp_path / "text.npz", num_answers=count)
        found = Inputs.read(request).text
        assert (
            found is not None
            and found.prompts == text.prompts[:count]
            and found.tokens == text.tokens[:count]
        )
    with pytest.raises(
        ValueError, match="holds the token 3, and the target's are 0..2: another model wrote it"
    ):
        text.check_vocabulary(3, tmp_path)
