"""The cost table: measured once for a machine, model and drafter, kept, and measured again when damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.toy import make

# isort: split
import numpy as np

from redrafter_mlx import kernels
from redrafter_mlx.auto import timing
from redrafter_mlx.auto.table import CostTable, cache_path, keep_table
from redrafter_mlx.auto.timing import cost_table

TABLE = CostTable({1: 1.0, 2: 1.5, 4: 2.5}, {1: 0.1, 8: 0.8}, {1: 0.2, 8: 0.9})


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An empty cache folder, and measuring that takes no time; holds an entry for each measurement."""
    calls: list[int] = []

    def measure(*_: Any) -> CostTable:
        calls.append(1)
        return TABLE

    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "measure", measure)
    return calls


def test_measured_once_and_kept(measurements: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    assert model.drafter is not None
    with caplog.at_level(logging.WARNING):
        assert cost_table(model.target, model.drafter) == TABLE
    assert [r.message for r in caplog.records if "measuring what drafting costs" in r.message]
    caplog.clear()
    assert cost_table(model.target, model.drafter) == TABLE
    assert len(measurements) == 1 and not caplog.records
    said: list[int] = []
    cost_table(model.target, model.drafter, fresh=True, on_measure=lambda: said.append(1))
    assert len(measurements) == 2 and said == [1]


def test_a_file_for_each_drafter_blas_and_thread_count(
    measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wide = make("llama"), make("llama", exit_dim=128)
    assert model.drafter is not None and wide.drafter is not None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [cache_path(model.target, model.drafter), cache_path(wide.target, wide.drafter)]
    monkeypatch.setattr(kernels.blas, "loaded", lambda: "another.so")  # type: ignore[attr-defined]
    paths.append(cache_path(model.target, model.drafter))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    paths.append(cache_path(model.target, model.drafter))
    monkeypatch.setenv("REDRAFTER_CPU", "off")
    paths.append(cache_path(model.target, model.drafter))
    assert len(set(paths)) == 5


def changed(**changes: object) -> str:
    return json.dumps({**TABLE.to_dict(), **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"version":' + '{"a":' * 100_000,
        "\x00\x01",
        changed(version=0),
        changed(rows={}),
        changed(rows={"2": 1.0}),
        changed(rows=None),
        changed(rows=[1.0, 2.0]),
        changed(rows={"1": "fast"}),
        changed(rows={"1": None}),
        changed(rows={"one": 1.0}),
        changed(rows={"1": 0.0}),
        changed(rows={"1": -1.0}),
        changed(rows={"1": float("nan")}),
        changed(rows={"1": float("inf")}),
        changed(rows={"1": 10**400}),
        changed(rows={"1": 1.0, "0": 1.0}),
        changed(rows={"1": 1.0, str(10**30): 1.0}),
        changed(first_level={}, per_level={}),
        changed(waiting="long"),
        changed(unrest=float("nan")),
        changed(first_level={"1": 0.1}),
        changed(per_level={"1": float("nan"), "8": 0.9}),
        changed(first_level={"-1": 0.1}, per_level={"-1": 0.1}),
    ],
    ids=lambda content: content[-60:] or "empty",
)
def test_a_damaged_file_is_measured_again(
    content: str, measurements: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    assert model.drafter is not None
    path = cache_path(model.target, model.drafter)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert cost_table(model.target, model.drafter) == TABLE
    assert len(measurements) == 1 and "cannot be used" in caplog.text
    assert CostTable.from_dict(json.loads(path.read_text())) == TABLE, "and kept in its place"


def test_what_cannot_be_kept_is_used_all_the_same(
    measurements: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cost").write_text("a file where the folder should be")
    model = make("llama")
    assert model.drafter is not None
    assert cost_table(model.target, model.drafter) == TABLE
    assert "could not be kept" in caplog.text


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    keep_table(TABLE, tmp_path / "new" / "table.json")
    assert CostTable.from_dict(json.loads((tmp_path / "new" / "table.json").read_text())) == TABLE


def test_interpolation() -> None:
    seconds = TABLE.verify_seconds()
    assert seconds[:5].tolist() == pytest.approx([0, 1, 1.5, 2.0, 2.5])
    assert np.all(np.diff(seconds) > 0)
    assert TABLE.draft_seconds(8, 4) == pytest.approx(0.8 + 2 * 0.9)
    assert TABLE.draft_seconds(1, 2) == pytest.approx(0.1)
    assert CostTable({1: 1.0}, {1: -0.5}, {1: 0.2}).draft_seconds(1, 2) == 0, (
        "no draft takes less than no time"
    )


def test_a_table_of_a_busy_minute_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In later processes, the quietest of all counting; and not for ever."""
    model, unrests = make(), [1.9, 1.6, 1.7, 1.0]
    made: list[CostTable] = []
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))

    def measure(target: Any, drafter: Any) -> CostTable:
        made.append(CostTable({1: 1.0 + len(made), 2: 9.0}, {1: 0.1}, {1: 0.1}, unrest=unrests[len(made)]))
        return made[-1]

    monkeypatch.setattr(timing, "measure", measure)
    assert cost_table(model.target, model.drafter).rows[1] == 1.0
    second = cost_table(model.target, model.drafter)
    assert (second.rows[1], second.attempts) == (2.0, 2)
    third = cost_table(model.target, model.drafter)
    assert (third.rows[1], third.attempts) == (2.0, 3), "the third was louder than the second"
    assert cost_table(model.target, model.drafter) == third and len(made) == timing.MOST_ATTEMPTS
