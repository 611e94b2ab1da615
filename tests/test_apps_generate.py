"""`redrafter generate` and `redrafter demo` on a tiny model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx
from apps.cli import main
from apps.demo import PROMPTS
from redrafter_mlx.auto import CostTable
from tests import toy

TEXTS = ["hello there", "abc", "what is it?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "id": text[:3]}) for text in TEXTS))
    return path


def _json(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> list[dict[str, Any]]:
    assert main(["generate", *map(str, argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_a_file_of_prompts_gives_the_same_tokens_whatever_is_drafted(
    folder: Path, prompts: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--model", folder, "--prompts", prompts, "--seed", "3", "--temperature", temperature)
    plain = _json(capsys, *shared, "--max-tokens", "12", "--draft", "off")
    drafted = _json(capsys, *shared, "--max-tokens", "12", "--draft", "3x4")
    assert [line["index"] for line in plain] == [0, 1, 2]
    assert [line["id"] for line in plain] == [text[:3] for text in TEXTS]
    assert [line["token_ids"] for line in plain] == [line["token_ids"] for line in drafted]
    assert [line["text"] for line in plain] == [line["text"] for line in drafted]
    assert all(line["stats"]["drafted_tokens"] == 0 for line in plain)
    assert all(line["stats"]["drafted_tokens"] > 0 for line in drafted)
    assert all(len(line["token_ids"]) == line["stats"]["generated_tokens"] for line in drafted)


def test_text_goes_to_stdout_and_the_summary_to_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--model", folder, "abc", "--max-tokens", "8", "--draft", "off", "--seed", "5")
    [line] = _json(capsys, *argv)
    assert main(["generate", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert out == line["text"] + "\n"
    assert "tokens/s" in err and "seed 5" in err and err.count("\n") == 1


def test_standard_input_is_a_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--model", folder, "--max-tokens", "8", "--draft", "off")
    [given] = _json(capsys, "abc", *argv)
    for dash in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
        [read] = _json(capsys, *dash, *argv)
        assert read["token_ids"] == given["token_ids"]


def test_raw_leaves_the_chat_template_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", folder, "abc", "--max-tokens", "4", "--draft", "off")
    [chat], [raw] = _json(capsys, *argv), _json(capsys, *argv, "--raw")
    assert chat["stats"]["prompt_tokens"] == 3 + 3  # <|user|> abc <|end|> <|assistant|>
    assert raw["stats"]["prompt_tokens"] == 3


def test_system_message_and_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", folder, "abc", "--max-tokens", "24", "--draft", "off")
    [line] = _json(capsys, *argv, "--system", "xyz")
    assert line["stats"]["prompt_tokens"] == 6 + 5
    [whole] = _json(capsys, *argv)
    at = next(i for i, c in enumerate(whole["text"]) if i > 1 and c.isascii())
    stop = whole["text"][at]
    [cut] = _json(capsys, *argv, "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_a_prompt_too_long_is_found_before_the_first_one_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('"fine"\n' + json.dumps("x" * 600))
    assert main(["generate", "--model", str(folder), "--prompts", str(path), "--draft", "off"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: prompt 1: ") and "512" in err


@pytest.fixture(scope="module")
def bare(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its drafter."""
    path = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("drafter"))
    return path


@pytest.mark.parametrize(("options", "notes"), [([], 1), (["--draft", "off"], 0), (["--drafter", "none"], 0)])
def test_a_model_without_a_drafter_decodes_plainly_and_says_so_once(
    bare: Path, prompts: Path, options: list[str], notes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", "--model", str(bare), "--prompts", str(prompts), "--max-tokens", "4", *options]
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert err.count("has no drafter") == notes and "drafter" not in out


def test_that_drafting_does_not_pay_is_said_once(
    folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine on which a row more costs as much as a step."""
    rows = {n: float(n) for n in (1, 2, 4, 8, 64)}
    table = CostTable(rows, {1: 1.0}, {1: 1.0})
    monkeypatch.setattr("redrafter_mlx.model.cost_table", lambda *_: table)
    given = ["generate", "--model", str(folder), "--prompts", str(prompts), "--max-tokens", "4"]
    assert main([*given, "--draft", "2x3"]) == 0
    assert "does not pay" not in capsys.readouterr().err
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert err.count("drafter does not pay") == 1 and "does not pay" not in out


def test_the_first_use_says_that_it_measures_before_the_answer_and_nothing_within_it(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the level of the log that a user has without --verbose."""
    table = CostTable({1: 1.0, 2: 1.01, 64: 1.5}, {1: 0.01}, {1: 0.01})
    before: list[tuple[list[str], str]] = []

    def measure(*_: Any) -> CostTable:
        before.append((caplog.messages[:], capsys.readouterr().out))
        return table

    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr("redrafter_mlx.auto.timing.measure", measure)
    given = ["generate", "--model", str(folder), "hello", "--max-tokens", "24", "--draft", "auto"]
    assert main(given) == 0
    said = ["measuring what drafting costs on this machine, once (some seconds)"]
    assert before == [(said, "")] and caplog.messages == said
    assert main(given) == 0
    assert len(before) == 1 and caplog.messages == said, "the table was kept"


def test_freed_memory_is_kept_from_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load = redrafter_mlx.load
    monkeypatch.setattr("redrafter_mlx.kernels.keep_freed_memory", lambda: events.append("keep"))
    monkeypatch.setattr(
        redrafter_mlx, "load", lambda *given, **named: (events.append("load"), load(*given, **named))[1]
    )
    assert main(["generate", "--model", str(folder), "abc", "--max-tokens", "2", "--draft", "off"]) == 0
    assert events == ["keep", "load"]


def test_demo_compares_and_says_identical(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(folder), "--draft", "2x3", "--max-tokens", "10"]) == 0
    out = capsys.readouterr().out
    assert "identical: yes" in out and "drafted (2x3)" in out and "plain" in out


def test_demo_fails_when_the_texts_differ(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = redrafter_mlx.generate

    def wrong(*args: Any, **options: Any) -> Any:
        text, stats = original(*args, **options)
        if options["draft"] != "off":
            stats.token_ids[-1] += 1
        return text, stats

    monkeypatch.setattr(redrafter_mlx, "generate", wrong)
    assert main(["demo", "--model", str(folder), "--draft", "2x3", "--max-tokens", "6"]) == 1
    captured = capsys.readouterr()
    assert "identical: no" in captured.out and "prompt 1, 2x3: token 5 is" in captured.out
    assert "(no tie in float32)" in captured.out and captured.err.startswith("error: ")


def test_demo_says_that_a_difference_is_a_tie(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 100 of the target has the logit of another one, which plain decoding takes; the drafted text has it."""
    original, load = redrafter_mlx.generate, redrafter_mlx.load
    first: list[int] = []

    def load_with_twin(*given: Any, **named: Any) -> Any:
        model = load(*given, **named)
        _, stats = original(model, PROMPTS[0], max_tokens=1, draft="off")
        first.append(stats.token_ids[0])
        head = model.target.model.lm_head
        head.weight[100] = head.weight[first[0]]
        return model

    def other_twin(model: Any, prompt: Any, **options: Any) -> Any:
        text, stats = original(model, prompt, **options)
        if options["draft"] != "off" and prompt == PROMPTS[0]:
            stats.token_ids[0] = ({100, first[0]} - {stats.token_ids[0]}).pop()
        return text, stats

    monkeypatch.setattr(redrafter_mlx, "load", load_with_twin)
    monkeypatch.setattr(redrafter_mlx, "generate", other_twin)
    assert main(["demo", "--model", str(folder), "--draft", "2x3", "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert "identical: no" in captured.out and "(a tie in float32)" in captured.out
    assert f"{first[0]} with " in captured.out and "100 with " in captured.out
    assert not captured.err


def test_marks_stand_around_runs_of_drafted_text(capsys: pytest.CaptureFixture[str]) -> None:
    from apps.demo import mark_drafted
    from redrafter_mlx.generation import Chunk
    from redrafter_mlx.stats import Stats

    pieces = [
        ("I", None),
        (" am", "recurrent"),
        ("", None),
        (" here", "recurrent"),
        (" now", None),
        ("!", "lookup"),
    ]
    chunks = [Chunk(text, 0, source, None, Stats()) for text, source in pieces]
    mark_drafted(iter(chunks), color=False)
    assert capsys.readouterr().out == "I[ am here] now{!}\n\n"
    mark_drafted(iter(chunks), color=True)
    assert capsys.readouterr().out == "I\x1b[32m am here\x1b[0m now\x1b[36m!\x1b[0m\n\n"


def test_a_drafter_of_which_nothing_is_accepted_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from apps.console import NEVER_ACCEPTED, DrafterNotes
    from redrafter_mlx.stats import Stats

    model: Any = SimpleNamespace(learned=None, drafter=SimpleNamespace(source="recurrent"))
    notes = DrafterNotes(model)
    few = Stats(drafted_by_source={"recurrent": NEVER_ACCEPTED // 2, "lookup": 500})
    notes.after_answer(few)
    assert "none of" not in capsys.readouterr().err, "too few to tell"
    notes.after_answer(few)
    notes.after_answer(few)
    assert capsys.readouterr().err.count(f"none of {NEVER_ACCEPTED} tokens") == 1
    other = DrafterNotes(model)
    other.after_answer(
        Stats(drafted_by_source={"recurrent": 900}, accepted_by_source={"recurrent": 1, "lookup": 7})
    )
    assert "none of" not in capsys.readouterr().err
