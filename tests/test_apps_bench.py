"""`redrafter bench` and `redrafter tune` from start to figures, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apps.cli import main
from tests.speculators import make_speculator
from tests.toy import save_folder

# isort: split
import redrafter_mlx
from apps import bench, tune
from redrafter_mlx.auto import timing
from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.measure import compare

FIELDS = {
    "device", "chip", "os", "versions", "commit", "model", "dtype", "drafter", "draft", "prompts", "tokens",
    "plain_tokens_per_second", "tokens_per_second", "mlx_lm_tokens_per_second", "speedup", "tokens_per_step",
    "efficiency", "accepted_by_depth", "identical", "syncs_per_step", "ops_per_step", "bytes_per_step",
    "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.1)
    (tmp_path / "prompts.jsonl").write_text('"Hello"\n{"prompt": "What is red?", "category": "colors"}\n')
    return save_folder(tmp_path / "model")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(report, dict)
    return report


def test_bench_ends_with_every_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = folder.parent / "prompts.jsonl", folder.parent / "out.json"
    given = [
        "bench",
        "--model",
        str(folder),
        "--draft",
        "2x3@4",
        "--prompts",
        str(prompts),
        "--max-tokens",
        "8",
    ]
    assert main([*given, "--draft-model", str(folder), "--profile", "--out", str(out)]) == 0
    report = last_line(capsys)
    assert set(report) >= FIELDS
    assert report["identical"] is True and report["syncs_per_step"] == 1.0 and report["prompts"] == 2
    assert report["mlx_lm_speculative_tokens_per_second"] and set(report["categories"]) == {"all", "colors"}
    assert set(report["profile_ms"]) == {"draft", "verify", "accept", "keep", "host"}
    assert json.loads(out.read_text()) == report
    assert report["divergences"] == []


def test_bench_says_where_texts_part(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = redrafter_mlx.generate

    def wrong(model: Any, prompt: list[int], **options: Any) -> Any:
        text, stats = original(model, prompt, **options)
        if options["draft"] != "off" and len(prompt) > 12:  # the second one
            stats.token_ids[3] += 1
        return text, stats

    monkeypatch.setattr(compare, "generate", wrong)
    prompts = folder.parent / "prompts.jsonl"
    given = ["--model", str(folder), "--draft", "2x3", "--prompts", str(prompts), "--max-tokens", "6"]
    assert main(["bench", *given, "--no-mlx-lm"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    (found,) = report["divergences"]
    assert not report["identical"] and not found["is_float32_tie"]
    assert (found["prompt"], found["index"]) == (1, 3) and found["best"][0] == found["tokens"][0]
    assert "identical: no (1 differ, 0 by a tie)" in captured.err


@pytest.mark.slow
def test_tune_measures_every_shape_and_draws_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "WIDTHS", (1, 2))
    monkeypatch.setattr(tune, "LENGTHS", (2, 3))
    plot, prompts = folder.parent / "map.png", folder.parent / "prompts.jsonl"
    given = ["tune", "--model", str(folder), "--prompts", str(prompts), "--max-tokens", "8", "--limit", "2"]
    assert main([*given, "--plot", str(plot)]) == 0
    report = last_line(capsys)
    shapes = {"1x2", "1x3", "2x2", "2x3"}
    assert set(report["measured_by_shape"]) == set(report["predicted_by_shape"]) == shapes
    assert all(value > 0 for value in report["measured_by_shape"].values())
    assert str(report["advice"]).startswith("auto will ")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tune_keeps_within_the_drafters_limits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    speculator = folder.parent / "speculator"
    save_drafter(make_speculator(vocab_size=vocab_size, n_predict=2), speculator)
    given = [
        "tune",
        "--model",
        str(folder),
        "--drafter",
        str(speculator),
        "--max-tokens",
        "8",
        "--limit",
        "1",
    ]
    assert main([*given, "--prompts", str(folder.parent / "prompts.jsonl")]) == 0
    report = last_line(capsys)
    assert report["lengths"] == [2, 3] and "8x3" in report["measured_by_shape"]
    assert set(report["measured_by_shape"]) == set(report["predicted_by_shape"])


@pytest.mark.parametrize("draft", ["auto", "2x3"])
def test_bench_without_a_drafter_is_an_error(
    folder: Path, draft: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", str(folder), "--drafter", "none", "--draft", draft]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "has no drafter" in err and "--drafter" in err


def test_bench_without_a_drafter_may_compare_plain_decoding(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["bench", "--model", str(folder), "--drafter", "none", "--draft", "off", "--max-tokens", "4"]
    assert main([*given, "--prompts", str(folder.parent / "prompts.jsonl"), "--no-mlx-lm"]) == 0
    report = last_line(capsys)
    assert report["identical"] is True and report["tokens_per_step"] == 1.0


def test_tune_without_a_drafter_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--model", str(folder), "--drafter", "none"]) == 2
    assert "tune needs a drafter" in capsys.readouterr().err


def refused_early(folder: Path, option: str, value: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of bench or tune where loading a model would be noticed."""
    command = "bench" if option == "--out" else "tune"

    def loaded(*_: object) -> None:
        raise AssertionError("the model is loaded before the option is checked")

    monkeypatch.setattr(f"apps.{command}.load_model", loaded)
    return main([command, "--model", str(folder), option, value])


@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize(("name", "rule"), [("model", "is a folder"), ("prompts.jsonl/x", "Not a directory")])
def test_a_result_that_cannot_be_written_is_refused_before_measuring(
    folder: Path,
    option: str,
    name: str,
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused_early(folder, option, str(folder.parent / name), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and option in err and rule in err and name in err


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert refused_early(folder, "--plot", str(folder.parent / "x.png"), monkeypatch) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_bench_prints_its_result_though_the_file_cannot_be_written_after_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "results" / "out.json"
    run = bench._run

    def full(settings: bench.Settings) -> dict[str, Any]:
        (folder.parent / "results").write_text("a file took its place meanwhile")
        return run(settings)

    monkeypatch.setattr(bench, "_run", full)
    given = ["bench", "--model", str(folder), "--draft", "2x3", "--max-tokens", "4", "--no-mlx-lm"]
    prompts = str(folder.parent / "prompts.jsonl")
    assert main([*given, "--prompts", prompts, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["prompts"] == 2 and "error: " in captured.err


def test_bench_runs_each_source_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = folder.parent / "prompts.jsonl"
    given = [
        "bench",
        "--model",
        str(folder),
        "--draft",
        "2x3@4",
        "--prompts",
        str(prompts),
        "--max-tokens",
        "8",
    ]
    assert main([*given, "--each", "--no-mlx-lm"]) == 0
    report = last_line(capsys)
    for name, source in (("drafter alone", "recurrent"), ("lookup alone", "lookup")):
        assert report[name]["identical"] is True and report[name]["rows_per_step"] >= 1, source
    assert set(report["accepted_by_source"]) <= {"recurrent", "lookup"}
    assert main([*given, "--each", "--no-lookup"]) == 2
    assert "--each needs" in capsys.readouterr().err
