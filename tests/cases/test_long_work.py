"""Work of minutes or hours: mistakes show before it, and its results are not lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases.command import ROOT, Result, redrafter, refused, works_or_refused

SMALL = ("--self-prompt", 24, "--rows", 12, "--max-tokens", 24, "--epochs", 2, "--draft-vocab", 40)


def train(model: Path, out: Path, *more: object) -> Result:
    return redrafter("train", "--model", model, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDRAFTER_CACHE", str(out.parent / "cache"))
        done = train(model, out)
    assert done.code == 0, done
    yield out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--quantize", 3),
        ("--start-from", "/no/where"),
        ("--draft-vocab", -1),
        ("--epochs", "inf"),
        ("--layers", -1),
    ],
)
def test_mistakes_show_before_text_is_written(
    option: str, value: object, model: Path, tmp_path: Path
) -> None:
    refused(train(model, tmp_path / "out", option, value))
    assert not list(tmp_path.rglob("shard*"))


@pytest.mark.parametrize("option", [("--layers", 3), ("--exit-dim", 128), ("--self-prompt", 12)])
def test_a_finished_folder_is_not_taken_for_another_run(
    option: tuple[object, ...], model: Path, trained: Path
) -> None:
    refused(train(model, trained, *option))


def test_a_shard_of_no_bytes(model: Path, tmp_path: Path) -> None:
    """As a power cut leaves it."""
    assert train(model, tmp_path / "out").code == 0
    shard = tmp_path / "out" / "data" / "shard-00000.npz"
    shard.write_bytes(b"")
    if not works_or_refused(done := train(model, tmp_path / "out")):
        refused(done, shard.name)


def test_two_trainings_in_one_folder(model: Path, tmp_path: Path) -> None:
    given = [sys.executable, "-m", "apps", "train", "--model", str(model), "--out", str(tmp_path / "out")]
    given += [*map(str, SMALL), "--epochs", "30", "--validate-every", "10"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(given, cwd=ROOT, **quiet) for _ in range(2)]  # type: ignore[call-overload]
    codes = sorted(process.wait(300) for process in started)
    assert codes in ([0, 2], [0, 0]), codes
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)), steps


@pytest.mark.parametrize("out", ["folder", "", "file/x.json"])
def test_a_result_that_cannot_be_written(out: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "p.jsonl").write_text('"a"\n')
    given = ("--model", model, "--max-tokens", 8, "--prompts", tmp_path / "p.jsonl")
    where = tmp_path / out if out else ""
    done = redrafter("bench", *given, "--draft", "2x3", "--no-mlx-lm", "--out", where)
    assert _said_or_early(done, "tokens/s"), done
    done = redrafter("tune", *given, "--predict", "--plot", where)
    assert _said_or_early(done, "measuring"), done


def _said_or_early(done: Result, work: str) -> bool:
    """Refused before the work, or the result is on stdout all the same."""
    assert "Traceback" not in done.err
    return (done.code == 2 and work not in done.err) or done.out.strip().startswith("{")


def test_what_is_no_file_is_not_replaced_by_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\n')
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    given = ("--model", model, "--max-tokens", 4, "--prompts", tmp_path / "p.jsonl", "--draft", "2x3")
    redrafter("bench", *given, "--no-mlx-lm", "--out", tmp_path / "pipe")
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
